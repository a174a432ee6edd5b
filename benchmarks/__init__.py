"""Where the sampler stands beside what people use today: ``python -m benchmarks``."""
