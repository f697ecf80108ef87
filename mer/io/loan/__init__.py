"""Loan of the reader and of residents' slots to a compute job, which reads missing experts itself."""
