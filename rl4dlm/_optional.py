"""Imports a dependency that only some uses of rl4dlm need, or says how to install it.

Owns the error a missing extra gives. Which extras exist is stated in pyproject.toml.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, which `pip install 'rl4dlm[extra]'` brings.

    Args:
        module: dotted name, for example `"matplotlib.pyplot"`.
        extra: the extra of rl4dlm that installs it.
        purpose: what needs it, as the subject of a sentence ("the accuracy plot").

    Raises:
        ImportError: the package is not installed. An installed package that fails to import keeps its own error.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'rl4dlm[{extra}]'"
        ) from error
