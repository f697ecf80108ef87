"""`--prefix FILE`: begin with what reading the prompt gave an earlier run, or keep it for a later one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mer.cli.console import note
from mer.cli.interrupt import Interrupt
from mer.cli.session import Result
from mer.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from mer.engine import Engine, Prompt


class SavedPrefix:
    """The file that `--prefix` names.

    Raises:
        ConfigError: there is no folder that it could be in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_restored = 0
        if not path.parent.is_dir():
            raise ConfigError(f"--prefix {path}: there is no folder {path.parent}")

    async def restore(self, engine: Engine) -> None:
        """Load the file if there is one.

        Raises:
            PrefixFileError: it cannot be used.
            OSError: it cannot be read.
        """
        try:
            self._n_restored = await engine.load_prefix(self.path)
        except FileNotFoundError:
            return
        note(f"prefix: {self._n_restored} tokens restored from {self.path}", "dim")

    async def keep(self, engine: Engine, prompt: Prompt, result: Result, interrupt: Interrupt) -> str:
        """Save the prompt if there was no file, and return in a line what has become of the prefix; ctrl-C ends it.

        Raises:
            OSError: the file cannot be written.
        """
        if self._n_restored:
            if result.tokens and not result.reused_tokens:
                return "prefix: nothing of it was reused, as the prompt begins otherwise"
            return f"prefix: {result.reused_tokens} of {result.prompt_tokens} prompt tokens reused"
        if not result.tokens:
            return "prefix: not saved, as the prompt was not read to its end"
        n_saved = 0
        with interrupt.stopping():
            try:
                n_saved = await engine.save_prefix(prompt, self.path)
            except RequestError as error:  # the prompt was good enough to be read
                return f"prefix: not saved: {error}"
        if not n_saved:
            return "prefix: not saved: interrupted"
        return f"prefix: {n_saved} of {result.prompt_tokens} prompt tokens saved to {self.path}"
