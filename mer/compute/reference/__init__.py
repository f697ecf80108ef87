"""The NumPy oracle that the tests compare both workers with."""
