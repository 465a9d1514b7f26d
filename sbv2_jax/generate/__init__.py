"""Pictures from prompts.

The room has the name of the public function `sbv2_jax.generate`, and so it is called as that function is.
"""

import sys
import types
from typing import Any


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from sbv2_jax.generate.inference import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
