"""One operator each, in float64: the same names as the blocks of both workers."""
