"""The one place that states the version."""

from __future__ import annotations

VERSION = "0.1.0"
