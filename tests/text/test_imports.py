"""The text room stands alone: neither the event loop nor the compiler is needed to turn text into ids."""

from __future__ import annotations

import subprocess
import sys


def test_text_needs_neither_trio_nor_numba() -> None:
    program = (
        "import sys, mer.text.chat, mer.text.detokenizer, mer.text.stop, mer.text.tokenizer;"
        "print(sorted({'trio', 'numba', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
