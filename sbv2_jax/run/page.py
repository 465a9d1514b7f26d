"""The page of a run: one HTML file with its samples, curves, settings against the paper's, checkpoints and machine."""

import html
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sbv2_jax.checkpoint.files import step_numbers
from sbv2_jax.checkpoint.manifest import CheckpointError, flatten, read_manifest
from sbv2_jax.convert.formats.files import read_json, replaced_file
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.html_page import html_page, html_table, inline
from sbv2_jax.run.config import stable_diffusion_21
from sbv2_jax.run.directory import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METRICS,
    PAGE,
    STARTS,
    json_lines,
    sample_pictures,
)
from sbv2_jax.run.metric_curves import curve, metrics_of
from sbv2_jax.tree import GIB

_MOST_SAMPLES = 24
_WIDEST = 1600  # pixels of a sample picture in the page
# Fields, and groups of them, that are no part of a recipe: how a machine does the same work, and what is kept of it.
_NO_RECIPE = (
    "accumulate",
    "attention",
    "checkpoint",
    "evaluate",
    "limits",
    "mesh",
    "precision",
    "programs",
    "remat",
    "sample",
)
_STYLE = """
.curves { display: flex; flex-wrap: wrap; gap: .5em } .curves img { width: 22em }
.samples img { display: none } .samples img.shown { display: block; max-width: none; width: max(100%, 52em) }
input[type=range] { width: 100% }
.settings td { white-space: normal; overflow-wrap: anywhere; text-align: left }
"""
# Without it the last picture is shown.
_SLIDER = """
<script>
const slider = document.querySelector(".samples input");
slider.addEventListener("input", () => {
  document.querySelectorAll(".samples img").forEach((picture, number) =>
    picture.classList.toggle("shown", number == slider.value));
  document.querySelector(".samples output").textContent = slider.dataset.steps.split(",")[slider.value];
});
</script>
"""


class _Checkpoint(NamedTuple):
    step: int
    bytes: int
    figures: dict[str, Any]


class _Found(NamedTuple):
    """What a run's directory holds."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    samples: dict[int, Path]
    checkpoints: list[_Checkpoint]
    exported: bool


def write_page(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run, which may be training, and returns its path; without `out` it is RUN/report.html.

    Raises InputError for a directory that no run has written to, and where it cannot be written.
    """
    run = Path(run)
    page, out = run_page(run), Path(out or run / PAGE)
    with replaced_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def run_page(run: Path) -> str:
    """Returns the page of a run as HTML that needs no other file; raises InputError as `write_page` does."""
    found = _read(run)
    return html_page(found.name, _parts(found), _STYLE)


def _read(run: Path) -> _Found:
    if not (run / CONFIG).is_file():
        raise InputError(f"{run} is no run of launch/train.py: it has no {CONFIG}")
    checkpoints = []
    for step in step_numbers(run / CHECKPOINTS):
        try:
            manifest = read_manifest(run / CHECKPOINTS / str(step), step)
        except CheckpointError:  # damaged, or being deleted: a resumed run says so
            continue
        figures = {name: value for name, value in manifest.extra.items() if isinstance(value, int | float)}
        checkpoints.append(_Checkpoint(step, sum(manifest.files.values()), figures))
    return _Found(
        name=run.resolve().name,
        config=read_json(run / CONFIG),
        lines=[line for line in json_lines(run / METRICS) if isinstance(line.get("step"), int)],
        starts=json_lines(run / STARTS),
        samples=sample_pictures(run),
        checkpoints=checkpoints,
        exported=(run / EXPORT).is_dir(),
    )


def _parts(found: _Found) -> Iterator[str]:
    done, steps = found.lines[-1]["step"] if found.lines else 0, found.config.get("steps")
    state = "Its export is written." if found.exported else "It has no export yet."
    yield f"<h1>{html.escape(found.name)}</h1><p>{done:,} of {steps:,} steps. {state}</p>"
    yield html_table(_glance(found))
    if found.samples:
        yield "<h2>Samples</h2>" + _samples(found.samples)
    if found.lines:
        yield "<h2>Curves</h2><p>Of long runs: means, with the lowest and highest values in a lighter shade. Red "
        yield 'ticks: values that were not finite.</p><div class="curves">'
        yield from _curves(found)
        yield "</div>"
    if found.checkpoints:
        yield "<h2>Checkpoints</h2>" + _checkpoints(found.checkpoints)
    yield "<h2>Settings</h2>" + _settings(found.config)
    if found.starts:
        yield "<h2>Starts</h2>" + _starts(found.starts)


def _glance(found: _Found) -> Iterator[tuple[str, str]]:
    """Yields what one wants to know first: hardware, speed, time, memory, steps that went wrong."""
    if found.starts:
        start = found.starts[-1]
        yield (
            "devices",
            f"{start['devices']} x {html.escape(start['device'])}, {start['processes']} process(es)",
        )
    if not found.lines:
        return

    def values(name: str) -> list[float]:
        return [line[name] for line in found.lines if line.get(name) is not None]

    batch = found.config.get("batch_size")
    if rates := [rate for rate in values("images_per_sec") if rate > 0]:
        yield "images a second, median", f"{statistics.median(rates):.3g}"
        if batch:
            hours, minutes = divmod(round(sum(batch / rate for rate in rates) / 60), 60)
            yield "time in steps, saves and pictures", f"{hours} h {minutes} min"
    if seconds := values("seconds_per_step"):
        yield "seconds a step, median", f"{statistics.median(seconds):.3g}"
    for name, said in (("memory/host_gib", "host"), ("memory/device_gib", "device")):
        if peaks := values(name):
            yield f"most memory of the {said}", f"{max(peaks):.2f} GiB"
    yield "steps skipped, their gradient not finite", f"{sum(values('skipped')):g}"


def _samples(samples: Mapping[int, Path]) -> str:
    steps = list(samples)
    if len(steps) > _MOST_SAMPLES:
        steps = [steps[place] for place in np.linspace(0, len(steps) - 1, _MOST_SAMPLES).round().astype(int)]
    pictures = "".join(
        f'<img alt="samples of step {step}" src="{_small(samples[step])}"{" class=shown" if step == steps[-1] else ""}>'
        for step in steps
    )
    last = len(steps) - 1
    slider = (
        f'<label>step <output>{steps[-1]}</output><input type="range" min="0" max="{last}" value="{last}" '
        f'data-steps="{",".join(map(str, steps))}" aria-label="step"></label>'
    )
    if not last:
        return f'<div class="samples scroll">{pictures}</div>'
    return f'<div class="samples">{slider}<div class="scroll">{pictures}</div></div>{_SLIDER}'


def _small(path: Path) -> str:
    picture = Image.open(path).convert("RGB")
    if picture.width > _WIDEST:
        picture = picture.resize(
            (_WIDEST, round(picture.height * _WIDEST / picture.width)), Image.Resampling.LANCZOS
        )
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=85)
    return inline(file.getvalue(), "image/webp")


def _curves(found: _Found) -> Iterator[str]:
    limit = found.config.get("limits", {}).get("latents_std")
    marks = {"latents/std": {"the data's": 1.0} | ({"limit": limit} if limit else {})}
    for name, (steps, values) in metrics_of(found.lines).items():
        if name == "skipped" and not any(values):
            continue
        picture = inline(curve(name, steps, values, marks.get(name, {})), "image/svg+xml")
        yield f'<img alt="{html.escape(name)}" src="{picture}">'


def _checkpoints(checkpoints: Sequence[_Checkpoint]) -> str:
    names = sorted({name for one in checkpoints for name in one.figures})
    rows = (
        (
            f"{one.step:,}",
            f"{one.bytes / GIB:.3g}",
            *(f"{one.figures[name]:.4g}" if name in one.figures else "-" for name in names),
        )
        for one in checkpoints
    )
    return html_table(rows, ("step", "GiB", *map(html.escape, names)))


def _settings(config: Mapping[str, Any]) -> str:
    """Returns what the run sets otherwise than the paper, and all of its configuration."""
    training = "lora" if config.get("student", {}).get("mode") == "lora" else ""
    own, paper = flatten(config), flatten(json.loads(stable_diffusion_21(training, {}).to_json()))
    rows = [
        tuple(
            f"<code>{html.escape(text)}</code>"
            for text in (name, json.dumps(value), json.dumps(paper.get(name)))
        )
        for name, value in own.items()
        if name.partition(".")[0] not in _NO_RECIPE and json.dumps(value) != json.dumps(paper.get(name))
    ]
    everything = html.escape(json.dumps(own, indent=1))
    return (
        "<p>Where this run departs from SwiftBrush v2's recipe (and, where the paper is silent, its authors' code):</p>"
        + f'<div class="settings">{html_table(rows, ("field", "this run", "the paper"))}</div>'
        + f"<details><summary>Every field</summary><pre>{everything}</pre></details>"
    )


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            html.escape(str(start["time"])),
            f"{start['step']:,}",
            f"{start['devices']} x {html.escape(start['device'])}",
            html.escape(", ".join(f"{name} {version}" for name, version in start["versions"].items())),
        )
        for start in starts
    )
    return html_table(rows, ("time (UTC)", "from step", "devices", "versions"))
