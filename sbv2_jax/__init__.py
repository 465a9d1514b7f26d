"""One-step text-to-image diffusion by SwiftBrush v2 distillation, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbv2_jax.generate.inference import generate
    from sbv2_jax.generate.pipeline import Pipeline
    from sbv2_jax.run.drawn import load

__all__ = ["Pipeline", "generate", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: a command that only reads flags need not wait for jax.
    if name in __all__:
        from sbv2_jax.generate import inference, pipeline
        from sbv2_jax.run import drawn

        rooms = {"generate": inference, "Pipeline": pipeline, "load": drawn}
        return getattr(rooms[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
