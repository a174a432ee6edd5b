"""What helps to choose parameters and to try the sampler: nothing of the sampler needs it."""
