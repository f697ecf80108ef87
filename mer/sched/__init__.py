"""Scheduling: sequences, KV accounting, the expert cache and its policies, and the scheduler actor."""
