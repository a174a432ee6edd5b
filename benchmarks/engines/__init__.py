"""Engines with their own samplers and with the kernel, each in a process of its own."""
