"""Run Mixture-of-Experts language models that are bigger than memory."""
