"""What CLIP's image processor does to a picture, as a differentiable function of arrays."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from sbv2_jax.models.config import ModelConfig

# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPImageConfig(ModelConfig):
    """The arguments of `preprocess`, as a checkpoint's `preprocessor_config.json` gives them.

    `size` is in pixels a side; mean and standard deviation are those of the channels in [0, 1].
    """

    # Resampling 3 is bicubic.
    FIXED = {
        "image_processor_type": (
            "CLIPImageProcessor",
            "CLIPImageProcessorFast",
            "CLIPFeatureExtractor",
            None,
        ),
        "do_resize": (True,),
        "resample": (3,),
        "do_rescale": (True,),
        "rescale_factor": (1 / 255,),
        "do_normalize": (True,),
        "do_pad": (False, None),
    }
    # `default_to_square` and `use_square_size` do not matter to a picture that is square.
    IGNORED = frozenset(
        {
            "data_format",
            "default_to_square",
            "device",
            "disable_grouping",
            "do_convert_rgb",
            "feature_extractor_type",
            "input_data_format",
            "pad_size",
            "processor_class",
            "return_tensors",
            "use_square_size",
        }
    )

    size: int = 224
    crop_size: int = 224
    do_center_crop: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size={self.size!r} is not one number of pixels")
        # On a square picture, cropping to the size that it was resized to changes nothing.
        if self.do_center_crop and self.crop_size != self.size:
            raise ValueError(f"crop_size={self.crop_size!r} differs from size={self.size}")
        for name in ("image_mean", "image_std"):
            if not isinstance(getattr(self, name), tuple) or len(getattr(self, name)) != 3:
                raise ValueError(f"{name}={getattr(self, name)!r} is not three numbers")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "preprocessor_config.json") -> Self:
        """Builds the arguments from the file's values, as `ModelConfig.from_dict` does."""
        sides = {name: _side(values[name]) for name in ("size", "crop_size") if values.get(name) is not None}
        return super().from_dict({**values, **sides}, source)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values to write back, in transformers' layout."""
        fixed = {name: allowed[0] for name, allowed in self.FIXED.items()}
        sides = {
            "size": {"shortest_edge": self.size},
            "crop_size": {"height": self.crop_size, "width": self.crop_size},
        }
        return {**fixed, **dataclasses.asdict(self), **sides}


def _side(size: Any) -> Any:
    """Returns the one number of pixels in a size given as a number or as sides, else the size as it is."""
    if isinstance(size, dict) and set(size) <= {"shortest_edge", "height", "width"}:
        sides = set(size.values())
        return sides.pop() if len(sides) == 1 else size
    return size


def preprocess(
    images: jax.Array,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> jax.Array:
    """Turns pictures into the input of CLIP's vision tower; the gradient flows through.

    images [B, H, W, 3] in [-1, 1]; values outside are clipped and get no gradient. Returns
    [B, size, size, 3] in the dtype of the images, computed in float32. What is not square is squeezed.
    The resize is bicubic (a = -0.5), its kernel widened to shrink, its weights renormalised at the border:
    PIL's, and PyTorch's with `antialias=True`.
    """
    batch, _, _, channels = images.shape
    x = jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
    x = jax.image.resize(x, (batch, size, size, channels), method="cubic", antialias=True)
    shift, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return ((x - shift) / scale).astype(images.dtype)
