"""Numba leaf kernels, one concept each: plain addresses and arrays, no trio, no attrs."""
