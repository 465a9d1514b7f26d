"""Measures the pictures of OpenMoji pipelines: FD, KID, what a classifier reads in them, and what CLIP says.

python benchmarks/openmoji_quality.py --model=bundled --settings=1:1,4:1,25:1,25:3 --out=runs/quality.jsonl
python benchmarks/openmoji_quality.py --model=runs/openmoji/export --settings=1:1 --out=runs/quality.jsonl
python benchmarks/openmoji_quality.py --model=real --out=runs/quality.jsonl      (the floor: other real pictures)

Adds a line of JSON to --out for each setting, STEPS:GUIDANCE, and seed that it does not hold yet. Prompts, real
pictures and noise are the same for all.
Needs `pip install -e ".[test,evaluate]"`.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from openmoji_judges import Classifier, lite0_features, real_pictures
from tqdm import tqdm

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.extractors.image_text import image_text
from sbv2_jax.evaluate.metrics.frechet import frechet_distance
from sbv2_jax.evaluate.metrics.kernel import kernel_distance
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.tokenizer import load_tokenizer
from sbv2_jax.openmoji import world as openmoji

_MODEL = flags.DEFINE_multi_string(
    "model", [], "A diffusers directory, 'bundled', or 'real'; may be repeated."
)
_SETTINGS = flags.DEFINE_list("settings", ["1:1"], "Settings STEPS:GUIDANCE.")
_OUT = cli.define_path("out", "The file of lines of JSON to add to.")
_CLIP = flags.DEFINE_string("clip", "bundled", "The pipeline whose clip/ scores, or none: ''.")
_COUNT = flags.DEFINE_integer("count", 2000, "Pictures of each side.", lower_bound=2)
_KIND = flags.DEFINE_enum("kind", "seen", openmoji.PROMPT_KINDS, "Which prompts.")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Validation to choose, test to report.")
_SEED = flags.DEFINE_multi_integer("seed", [0], "Seed of the noise; may be repeated.", lower_bound=0)
_SAMPLER = flags.DEFINE_string("sampler", "dpm", "The sampler of more than one step.")
_FITTED = flags.DEFINE_integer("fitted", 8000, "Real pictures to which the classifier is fitted.")
_BATCH = 100


def drawn(
    pipeline: sbv2_jax.Pipeline, captions: list[str], seed: int, steps: int, guidance: float
) -> np.ndarray:
    """Returns one picture for each caption, uint8 [N, 64, 64, 3]."""
    parts = []
    for start in tqdm(range(0, len(captions), _BATCH), unit="batch", desc=f"{steps} steps", leave=False):
        indices = [min(index, len(captions) - 1) for index in range(start, start + _BATCH)]
        texts = [captions[index] for index in indices]
        parts.append(
            pipeline.draw(
                texts,
                seed=seed,
                indices=indices,
                steps=steps,
                guidance=guidance,
                sampler=_SAMPLER.value,
            )
        )
    return np.concatenate(parts)[: len(captions)]


def main() -> None:
    settings = [_setting(text) for text in _SETTINGS.value]
    if not _MODEL.value:
        raise InputError("missing --model (see --help)")
    count = _COUNT.value
    everything = openmoji.prompts(_KIND.value, 2 * count, _SPLIT.value)
    prompts, others = everything[:count], everything[count:]
    score = _scorer() if _CLIP.value else None
    features = lite0_features()
    real = features(real_pictures(prompts))
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = [json.loads(line) for line in lines]
    classifier = Classifier(features, _FITTED.value)
    for model in _MODEL.value:
        pipeline = None if model == "real" else sbv2_jax.load(model)
        # The floor is of real pictures of other prompts.
        asked = others if pipeline is None else prompts
        captions = [one.caption for one in asked]
        wanted = itertools.product(settings, _SEED.value) if pipeline else [((0, 1.0), 0)]
        for (steps, guidance), seed in wanted:
            row = {"model": model, "steps": steps, "guidance": guidance, "kind": _KIND.value}
            row |= {"split": _SPLIT.value, "seed": seed, "count": count}
            if any(row.items() <= one.items() for one in done):
                continue
            start = time.perf_counter()
            pictures = drawn(pipeline, captions, seed, steps, guidance) if pipeline else real_pictures(others)
            seconds = time.perf_counter() - start
            fake = features(pictures)
            figures = {"fd": frechet_distance(real, fake), "kid_e3": 1e3 * kernel_distance(real, fake)}
            figures |= classifier.accuracy(fake, [one.scene for one in asked])
            figures |= {"clip": score(pictures, captions)} if score else {}
            figures |= {"img_per_s": count / seconds} if pipeline else {}
            line = json.dumps(row | {name: float(f"{value:.5g}") for name, value in figures.items()})
            print(line, flush=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _scorer() -> Callable[[np.ndarray, list[str]], float]:
    directory = resolve(_CLIP.value)
    clip, tokenizer = (
        load_component(directory / "clip", dtype="float32"),
        load_tokenizer(directory / "tokenizer"),
    )
    size = clip.config.vision_config.image_size
    judge = image_text(clip, tokenizer, CLIPImageConfig(size=size, crop_size=size))
    return lambda pictures, captions: float(judge.similarity(pictures, captions).mean())


def _setting(text: str) -> tuple[int, float]:
    steps, _, guidance = text.partition(":")
    try:
        return int(steps), float(guidance or 1)
    except ValueError:
        raise InputError(f"--settings: {text!r} is not STEPS:GUIDANCE") from None


if __name__ == "__main__":
    cli.run(main, required=("out",))
