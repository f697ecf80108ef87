"""`python -m mer` is the command `mer`."""

from __future__ import annotations

from mer.cli import main

if __name__ == "__main__":
    main()
