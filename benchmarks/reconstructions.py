"""Writes the OpenMoji protocol's real pictures as an autoencoder gives them back: what no UNet over it can pass.

python benchmarks/reconstructions.py --model=bundled --out=runs/reconstructed
python launch/evaluate.py --protocol=openmoji --pictures=real --pictures=runs/reconstructed --out=runs/autoencoder

`pip install -e ".[openmoji,evaluate]"` brings what both need.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from sbv2_jax import cli
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.models.registry import network
from sbv2_jax.openmoji.pretrain.pictures import in_batches, to_float, to_uint8
from sbv2_jax.openmoji.protocol import real_pictures

_MODEL = cli.define_path("model", "A diffusers directory, a hub id, or 'bundled'.")
_OUT = cli.define_path("out", "The folder of the pictures.")
_COUNT = flags.DEFINE_integer("count", 2000, "Pictures: of the protocol's first prompts.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "test", ("validation", "test"), "Whose prompts.")


def main() -> None:
    use_cache()
    vae = load_component(Path(resolve(_MODEL.value)) / "vae", dtype="float32")
    net = network(vae.config)

    @jax.jit
    def reconstruct(params, pictures):
        latents, _ = net.apply(params, to_float(pictures), method="encode")
        return net.apply(params, latents, method="decode")

    real = real_pictures(kind="recombined", split=_SPLIT.value, count=_COUNT.value, images=1)
    for row in tqdm(range(0, _COUNT.value, 64), unit="batch"):
        rows = range(row, min(row + 64, _COUNT.value))
        pictures = to_uint8(in_batches(reconstruct, vae.params, np.stack([real[each] for each in rows])))
        for each, picture in zip(rows, pictures, strict=True):
            save_png(Path(_OUT.value) / f"{each:05d}.png", picture)


if __name__ == "__main__":
    cli.run(main, required=("model", "out"))
