"""A user's own code by name. Importing runs it, so names must come from the user's recipe or command line, never from data."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from gidef.errors import InputError


def is_code(name: str) -> bool:
    """Whether a name means the user's own code: `package.module:attribute` or `folder/file.py:attribute`."""
    return ":" in name


def load(name: str) -> Any:
    """The attribute that `package.module:attribute` or `folder/file.py:attribute` names; its module runs if it was not imported yet.

    Raises: InputError if there is no such module, file or attribute.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        for part in attribute.split("."):
            module = getattr(module, part)
    except ModuleNotFoundError as error:
        top = (error.name or place).partition(".")[0]
        raise InputError(
            f"cannot load {name!r}: {error}. Set PYTHONPATH to the folder that holds {top}.py or {top}/, such as that of the recipe's file: PYTHONPATH=FOLDER gidef …"
        ) from error
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise InputError(f"cannot load {name!r}: {error}. Expected package.module:attribute or folder/file.py:attribute.") from error
    return module


def _from_file(path: Path) -> Any:
    """A module from its file, once; the script that is running serves for itself."""
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) and Path(module.__file__).resolve() == path:
            return module
    taken = path.stem in sys.modules  # by another module, which must stay what it is
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.exists():
        raise ImportError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half a module must not serve the next call
        raise
    return module
