"""From prompts to picture files: what `launch/generate.py` does."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm.auto import tqdm

from sbv2_jax.convert.formats.files import new_file, read_json, write_json
from sbv2_jax.data.prompts import describe_cut, notes_of, open_prompts
from sbv2_jax.data.text_prompts import clean_text
from sbv2_jax.diffusion.samplers import settled
from sbv2_jax.diffusion.schedule import ScheduleConfig, is_guided, make_schedule
from sbv2_jax.errors import InputError
from sbv2_jax.generate.inference import NEGATIVE_SCALE
from sbv2_jax.generate.pictures import PngWriter, save_png, tile
from sbv2_jax.generate.pipeline import Pipeline, check_numbers, check_prompts

SETTINGS = "settings.json"
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Drawn(NamedTuple):
    """What pictures are drawn of: its name, its noise schedule, and how it is loaded."""

    name: str
    schedule_config: ScheduleConfig
    load: Callable[[], Pipeline]


def draw(
    opened: Callable[[], Drawn],
    out: str,
    *,
    prompts: Sequence[str],
    prompts_file: str | None,
    column: str = "",
    num: int,
    seed: int,
    noise_file: str | None,
    steps: int | None,
    guidance: float,
    sampler: str | None,
    batch_size: int,
    negative_prompt: str = "",
    negative_scale: float = NEGATIVE_SCALE,
    height: int | None = None,
    width: int | None = None,
    precision: str = "float32",
) -> None:
    """Draws `num` pictures for each prompt and writes them to a .png file, or as 00000.png ... to a directory.

    `opened` opens the model, and is called once all else is right; `precision`, that in which it will be loaded, is for
    the record. The other settings are those of `Pipeline.draw`.
    The picture of a prompt depends on the prompt, its place and the seed. Pictures that a directory already
    holds are kept, so a run that was interrupted goes on where it stopped; `settings.json` beside them says what
    they were drawn from, and with anything else the directory is refused.
    Raises InputError for bad input before anything is written.
    """
    if bool(prompts) == bool(prompts_file):
        raise InputError("give either --prompt or --prompts")
    check_numbers(seed=seed, steps=steps, guidance=guidance, negative_scale=negative_scale)
    given, notes = _read_prompts(prompts_file, column) if prompts_file else (_cleaned(prompts), ())
    check_prompts(given)
    texts = [text for text in given for _ in range(num)]
    noise = _read_noise(noise_file, len(texts)) if noise_file else None
    path = Path(out)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix in _OTHER_PICTURES:
        raise InputError(f"--out={out}: only .png files are written")
    one_file = suffix == ".png"
    _require_writable(path.parent if one_file else path, out)
    drawn = opened()
    steps, sampler = settled(make_schedule(drawn.schedule_config), steps, sampler)
    settings = {
        "model": drawn.name,
        "prompts": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
        "num": num,
        "seed": seed,
        "noise": None if noise is None else hashlib.sha256(noise.data).hexdigest(),
        "steps": steps,
        "guidance": guidance if is_guided(guidance) else 1.0,
        "sampler": sampler,
    }
    # Not among them where they are not asked for: directories from before there were these go on.
    asked: dict[str, Any] = {"height": height, "width": width}
    if negative_prompt.strip():
        asked["negative_prompt"] = negative_prompt
        asked["negative_scale"] = None if is_guided(guidance) else negative_scale
    if precision != "float32":
        asked["precision"] = precision
    settings |= {name: value for name, value in asked.items() if value is not None}
    if not one_file:
        _require_same(path, settings)

    pipeline = drawn.load()
    pipeline.latents_of(height, width)
    for line in (*notes, *filter(None, [describe_cut(given, pipeline.tokenizer)])):
        logging.warning(line)
    names = [path / f"{index:05d}.png" for index in range(len(texts))]
    todo = [index for index in range(len(texts)) if one_file or not names[index].exists()]
    pictures: list[np.ndarray] = []
    with PngWriter() as files:
        for start in tqdm(range(0, len(todo), batch_size), unit="batch", disable=len(todo) <= batch_size):
            indices = todo[start : start + batch_size]
            # The last batch is filled up, so that one compiled program draws all of them.
            padded = (indices + [indices[-1]] * batch_size)[: min(batch_size, len(todo))]
            batch = pipeline.draw(
                [texts[index] for index in padded],
                seed=seed,
                indices=padded,
                noise=None if noise is None else noise[padded],
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                negative_prompt=negative_prompt,
                negative_scale=negative_scale,
                height=height,
                width=width,
            )[: len(indices)]
            if one_file:
                pictures.extend(batch)
                continue
            # Not before the first batch: what the pipeline refuses leaves nothing behind.
            if not (path / SETTINGS).exists():
                with new_file(path / SETTINGS) as partial:
                    write_json(partial, settings)
            files.write([names[index] for index in indices], batch)
    if one_file:
        save_png(path, tile(np.stack(pictures)))
    print(f"{len(todo)} picture(s): {path}")


def _read_prompts(place: str, column: str) -> tuple[list[str], tuple[str, ...]]:
    source = open_prompts(place, column)
    return [source[index] for index in range(len(source))], notes_of(source)


def _cleaned(prompts: Sequence[str]) -> list[str]:
    """Returns prompts of the command line as they would be read from a file, so that both draw the same."""
    try:
        return [clean_text(prompt) for prompt in prompts]
    except UnicodeEncodeError as error:
        raise InputError("a --prompt is not UTF-8: give it in a file, saved as UTF-8") from error


def _read_noise(path: str, count: int) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            noise = np.lib.format.read_array(file)  # np.load would also open an .npz
    except (OSError, ValueError) as error:
        raise InputError(f"--noise={path}: {error}") from error
    right = noise.ndim in (4, 5) and len(noise) == count and noise.dtype == np.float32
    if not right or not np.isfinite(noise).all():
        raise InputError(
            f"--noise={path}: it is {noise.dtype} {noise.shape}: finite float32 [{count}, h, w, c] is expected"
        )
    return np.ascontiguousarray(noise)


def _require_writable(folder: Path, out: str) -> None:
    """Raises InputError where no file can be made in a folder, or where it would have to be; leaves nothing."""
    try:
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write --out={out}: {error.strerror or error}") from error


def _require_same(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError, naming what differs, where a directory holds pictures drawn from anything else."""
    if not (directory / SETTINGS).exists():
        if any(directory.glob("*.png")):
            raise InputError(
                f"--out={directory} holds pictures, and no {SETTINGS} that says what they were drawn from: "
                "give another directory"
            )
        return
    there = read_json(directory / SETTINGS)
    differ = []
    for name in {**settings, **there}:
        if there.get(name) != settings.get(name):
            told = {"prompts": "the prompts differ", "noise": "the noise differs"}
            differ.append(
                told.get(name) or f"{name} is {there.get(name)!r} there, {settings.get(name)!r} here"
            )
    if differ:
        raise InputError(f"--out={directory} holds pictures of other settings: {'; '.join(differ)}")
