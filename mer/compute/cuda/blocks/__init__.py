"""One operator each, on the device: the same names as the blocks of the CPU worker."""
