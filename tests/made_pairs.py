"""A directory of pairs as launch/pairs.py would leave it, with latents drawn at random."""

import hashlib
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from sbv2_jax.data.latent_sets import pack, shard_names


def write_pairs(directory: Path, count: int = 7, shape: tuple[int, ...] = (2, 2, 3), **changes) -> np.ndarray:
    """Writes pairs whose prompts are "prompt 0", "prompt 1" ..., in shards of three; returns their latents."""
    directory.mkdir(parents=True)
    latents = np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float16)
    shards = {}
    for number, name in enumerate(shard_names("pairs", count, 3)):
        writer = ArrayRecordWriter(str(directory / name), "group_size:1,uncompressed")
        for index in range(3 * number, min(count, 3 * number + 3)):
            writer.write(pack(index, latents[index], f"prompt {index}"))
        writer.close()
        shards[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    manifest = {
        "format": 1,
        "count": count,
        "seed": 5,
        "steps": 4,
        "guidance": 2.0,
        "sampler": "ddim",
        "precision": "float32",
        "dtype": "float16",
        "latent_shape": list(shape),
        "shard_size": 3,
        "prompts": "a digest",
        "made_from": {"teacher": "another digest"},
        "shards": shards,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest | changes))
    return latents.astype(np.float32)
