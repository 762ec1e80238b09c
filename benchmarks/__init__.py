"""What is measured. ``python -m benchmarks`` lists it; docs/benchmarks.md explains it."""
