"""Memory plans: which part of a budget goes where, before anything of the model is read."""
