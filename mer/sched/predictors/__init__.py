"""Predictors: what the Markov chains and the next layer's router say, and which of them to believe."""
