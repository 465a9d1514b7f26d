"""Files of packages that import torchvision, which cannot be imported beside the pinned torch, imported alone.

A package's `__init__` is left out: an empty module stands for it, and its other files are found as ever.
"""

import importlib
import importlib.util
import sys
import types
from contextlib import contextmanager
from pathlib import Path


def fidelity(name: str) -> types.ModuleType:
    """A file of torch-fidelity."""
    with _bare("torch_fidelity"):
        return importlib.import_module(f"torch_fidelity.{name}")


def openclip(name: str) -> types.ModuleType:
    """A file of open_clip; of torchvision it has the name of a layer that no vision transformer holds."""
    from transformers import AutoModel  # noqa: F401 (it asks whether there is a torchvision: before one seems to be)

    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    stubs = {"torchvision": types.ModuleType("torchvision"), "torchvision.ops": types.ModuleType("torchvision.ops")}
    with _bare("open_clip"), _present(stubs | {"torchvision.ops.misc": misc}):
        return importlib.import_module(f"open_clip.{name}")


@contextmanager
def _bare(package: str):
    directory = Path(importlib.util.find_spec(package).origin).parent
    bare = types.ModuleType(package)
    bare.__path__ = [str(directory)]
    with _present({package: bare}):
        yield


@contextmanager
def _present(modules: dict[str, types.ModuleType]):
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
