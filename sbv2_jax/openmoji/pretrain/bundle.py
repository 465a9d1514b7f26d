"""The result of a pre-training: one diffusers pipeline directory with `clip/`, `vae_tiny/` and a model card."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.convert.formats.files import read_json, write_json
from sbv2_jax.convert.formats.pipeline import save_pipeline
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import class_of
from sbv2_jax.openmoji.pretrain.unet import SCHEDULER
from sbv2_jax.openmoji.world import ATTRIBUTION, LICENCE
from sbv2_jax.tree import count

MAX_BYTES = 40 * 10**6
_CARD = """---
license: cc-by-sa-4.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The OpenMoji world: a small text-to-image pipeline

A whole latent diffusion pipeline of {total:.1f} M parameters that draws emoji of 64 pixels on coloured backgrounds.
It is the default teacher of `sbv2_jax`, small enough to be distilled on a laptop, and good for nothing else.

![samples](grid_unet.png)

Captions with their samples ({steps} steps, guidance {guidance:g}); beside each, a real picture of that caption. The
last row is of drawings that training never shows: it composes what it knows, and invents nothing.

## Use

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("DIRECTORY")
pipe("a red apple on a blue background", num_inference_steps=25, guidance_scale=3.0).images[0]
```

`vae_tiny/` (AutoencoderTiny, on scaled latents) and `clip/` (a CLIPModel other than the one whose text tower
conditions the UNet) are there for the clamped CLIP loss.

## Data and licence

{pictures:,} captioned pictures of {identities} drawings (seed {seed}), composed by `sbv2_jax.openmoji.world`.
{attribution}
The pictures are adapted from OpenMoji, and this pipeline, which reproduces them, is under the same licence, {licence}.
Names: English CLDR short names (Unicode licence).

## How it was made

    {command}

| part | class | parameters |
|---|---|---|
{parts}

| figure | value |
|---|---|
{figures}

![reconstructions](grid_vae.png)

Pictures of drawings that training never shows: real, by the autoencoder, by the tiny decoder.
"""


def write_bundle(
    directory: Path,
    components: Mapping[str, Component],
    *,
    tokenizer_dir: Path,
    card: Mapping[str, Any],
    figures: Mapping[str, str],
    grids: Sequence[Path],
) -> None:
    """Writes the pipeline in float16, replacing what is there; see `save_pipeline` for its layout.

    Raises InputError where it would take more than `MAX_BYTES`.
    """
    fresh = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(
        fresh, base=None, tokenizer_dir=tokenizer_dir, scheduler=SCHEDULER, dtype="float16", **components
    )
    for path in (fresh / "tokenizer").iterdir():
        shutil.copyfile(path, fresh / "clip" / path.name)
    for name in ("text_encoder", "clip"):
        # transformers would keep float16, and diffusers would then mix it with its own float32.
        path = fresh / name / "config.json"
        write_json(path, {**read_json(path), "dtype": "float32"})
    for path in grids:
        shutil.copyfile(path, fresh / path.name)
    (fresh / "README.md").write_text(_card(components, card, figures), encoding="utf-8")
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise InputError(f"{fresh} takes {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)


def _card(components: Mapping[str, Component], card: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    def row(*cells: Any) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    sizes = {name: count(part.params) / 1e6 for name, part in components.items()}
    parts = [
        row(f"`{name}`", class_of(part.config), f"{sizes[name]:.2f} M") for name, part in components.items()
    ]
    return _CARD.format(
        total=sum(sizes.values()),
        attribution=ATTRIBUTION,
        licence=LICENCE,
        parts="\n".join(parts),
        figures="\n".join(row(name, value) for name, value in figures.items()),
        **card,
    )
