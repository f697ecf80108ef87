"""The small model that ships inside the package, so that a first run needs no download."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from mer.errors import ModelFileError

EMBEDDED_MODEL_NAME = "mer-tales-12M.q8_0.gguf"


def embedded_model_path() -> Path:
    """Return the path of the embedded GGUF model (a 12 M parameter Mixtral-architecture model, CC0-1.0).

    Raises:
        ModelFileError: the package was installed without its data, or does not lie in a file system.
    """
    resource = importlib.resources.files("mer") / "_data" / EMBEDDED_MODEL_NAME
    if not isinstance(resource, Path) or not resource.is_file():
        raise ModelFileError(
            f"the embedded model is missing: no file {resource}; install mer-engine from its wheel into a folder, "
            "or name a model file with --model"
        )
    return resource
