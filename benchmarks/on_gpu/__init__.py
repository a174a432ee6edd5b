"""The first minutes on a machine with a GPU: ``python -m benchmarks.on_gpu --out DIR``.

One command for at most eight minutes without a network. It asks what the machine is, whether the
GPU kernels give the reference's tokens, also from two threads and under compute-sanitizer, and what
they cost. Each step is a process with a limit of its own; README.md of benchmarks/ says what DIR
holds afterwards.
"""
