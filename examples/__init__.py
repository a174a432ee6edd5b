"""Programs to run and to read: examples/README.md."""
