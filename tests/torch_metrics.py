"""What of torchmetrics the tests compare with, imported where torch-fidelity is installed and torchvision is not.

torchmetrics imports a file of torch-fidelity if there is one, whose package imports torchvision, which cannot be
imported beside the pinned torch; the file itself needs none of it. An empty package stands for torch-fidelity's.
"""

import importlib.util
import sys
import types
from pathlib import Path

_NAME = "torch_fidelity"
_found = importlib.util.find_spec(_NAME) if _NAME not in sys.modules else None
if _found:
    sys.modules[_NAME] = types.ModuleType(_NAME)
    sys.modules[_NAME].__path__ = [str(Path(_found.origin).parent)]
try:
    from torchmetrics.image.fid import _compute_fid as frechet_of_moments  # noqa: F401
    from torchmetrics.image.inception import InceptionScore  # noqa: F401
    from torchmetrics.image.kid import poly_mmd  # noqa: F401
finally:
    if _found:
        del sys.modules[_NAME]
