"""From prompts to picture files: what `launch/generate.py` does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sbv2_jax.data.text_prompts import TextPrompts
from sbv2_jax.errors import InputError
from sbv2_jax.inference import check_prompts, load
from sbv2_jax.pictures import save_png, tile


def draw(
    model: str,
    out: str,
    *,
    prompts: Sequence[str],
    prompts_file: str | None,
    num: int,
    seed: int,
    noise_file: str | None,
    steps: int,
    guidance: float,
    sampler: str,
    batch_size: int,
) -> None:
    """Draws `num` pictures for each prompt and writes them to a .png file, or as 00000.png ... to a directory.

    The picture of a prompt depends on the prompt, its place and the seed. Pictures that a directory already
    holds are kept, so a run that was interrupted goes on where it stopped. Raises InputError for bad input
    before anything is written.
    """
    if bool(prompts) == bool(prompts_file):
        raise InputError("give either --prompt or --prompts")
    texts = list(TextPrompts(prompts_file)) if prompts_file else list(prompts)
    check_prompts(texts)
    texts = [text for text in texts for _ in range(num)]
    noise = _read_noise(noise_file, len(texts)) if noise_file else None
    path = Path(out)
    one_file = path.suffix == ".png"
    if path.suffix and not one_file:
        raise InputError(f"--out={out}: a .png file or a directory is expected")
    if not one_file and path.exists() and not path.is_dir():
        raise InputError(f"--out={out} is a file: a .png file or a directory is expected")

    pipeline = load(model)
    names = [path / f"{index:05d}.png" for index in range(len(texts))]
    todo = [index for index in range(len(texts)) if one_file or not names[index].exists()]
    pictures = []
    for start in tqdm(range(0, len(todo), batch_size), unit="batch", disable=len(todo) <= batch_size):
        indices = todo[start : start + batch_size]
        # The last batch is filled up, so that one compiled program draws all of them.
        padded = (indices + [indices[-1]] * batch_size)[: min(batch_size, len(todo))]
        batch = pipeline(
            [texts[index] for index in padded],
            seed=seed,
            indices=padded,
            noise=None if noise is None else noise[padded],
            steps=steps,
            guidance=guidance,
            sampler=sampler,
        )[: len(indices)]
        if one_file:
            pictures.extend(batch)
        else:
            for index, picture in zip(indices, batch, strict=True):
                save_png(names[index], picture)
    if one_file:
        save_png(path, tile(np.stack(pictures)))
    print(f"{len(todo)} picture(s): {path}")


def _read_noise(path: str, count: int) -> np.ndarray:
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--noise={path}: {error}") from error
    if len(noise) != count:
        raise InputError(f"--noise={path} holds {len(noise)} samples for {count} picture(s)")
    return noise
