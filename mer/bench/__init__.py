"""Benchmarks of `mer bench`, and the workloads that they run on."""
