"""Numba leaf kernels, one concept each: plain addresses and arrays, no trio, no attrs.

Importing the package decides the instruction-set form, which must happen before numba is imported.
"""

from mer.compute.kernels import target as target
