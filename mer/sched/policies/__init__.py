"""Cache policies: one small class and file each, made by name with `make_policy`."""
