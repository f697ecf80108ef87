"""Synthetic routing: streams of expert ids that are the same everywhere, and chains with the statistics of a model."""
