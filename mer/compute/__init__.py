"""Arithmetic behind memory channels: the worker protocol, the CPU worker, its kernels, and the NumPy reference."""
