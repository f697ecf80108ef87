"""Simulated parts and stress tests, public: what `mer` is tested with, for services that embed it."""
