"""`python -m tests.cli.fake_main JSON ARGS...`: the command with a fake engine whose settings the JSON gives."""

from __future__ import annotations

import json
import os
import signal
import sys

import mer.opening.engine
from mer.cli import main
from tests.cli.fake_engine import FakeEngine

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    if settings.pop("presses_twice", False):

        def press() -> None:
            os.write(2, b"pressing\n")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        settings["on_hang"] = press
    mer.opening.engine.open_engine = FakeEngine(**settings).open  # type: ignore[assignment]
    sys.argv[1:] = sys.argv[2:]
    main()
