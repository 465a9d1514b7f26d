"""Packages whose `__init__` imports torchvision, which cannot be imported beside the pinned torch, without it."""

import importlib.util
import sys
import types
from pathlib import Path


def stand_in(package: str) -> None:
    """Puts an empty module in the place of a package's `__init__`; its other files are found as ever.

    For good: torchmetrics imports a file of torch-fidelity wherever that is installed. Nothing happens where it is not.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is not None:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(Path(spec.origin).parent)]
