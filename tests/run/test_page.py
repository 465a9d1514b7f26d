"""The page of a run: what it says, of a run that ended, one that trains, and one with odd values."""

import base64
import io
import json
import re

import numpy as np
import pytest
from browser import needs_browser, opened
from PIL import Image

from sbv2_jax.errors import InputError
from sbv2_jax.run.config import stable_diffusion_21
from sbv2_jax.run.directory import sample_path
from sbv2_jax.run.metric_curves import curve, metrics_of
from sbv2_jax.run.page import write_page

START = {
    "time": "2026-01-02T03:04:05Z",
    "step": 0,
    "device": "TPU v4",
    "devices": 8,
    "processes": 2,
    "versions": {"jax": "0.10.1"},
}


@pytest.fixture
def run(tmp_path, rng):
    """A run of five steps out of ten, whose last line is being written."""
    directory = tmp_path / "a <run>"
    config = stable_diffusion_21("lora", {"steps": 10, "batch_size": 60, "student.lr": 3e-6, "mesh.fsdp": 4})
    directory.mkdir()
    (directory / "config.json").write_text(config.to_json())
    rates = [6.0, 12.0, 30.0, 20.0, 15.0]
    lines = [
        {"step": n, "loss/vsd": 0.1 * n, "images_per_sec": rate, "skipped": float(n == 3), "latents/std": 1.1}
        for n, rate in enumerate(rates, start=1)
    ]
    lines[2]["loss/vsd"] = None  # was not finite
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 6, "loss')
    (directory / "starts.jsonl").write_text(json.dumps(START) + "\n")
    for step in range(0, 60, 2):
        sample_path(directory, step).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 16, 3), np.uint8)).save(sample_path(directory, step))
    return directory


def cells(page, name):
    """The cells beside the one that begins a row."""
    (row,) = re.findall(rf"<tr><td>(?:<code>)?{re.escape(name)}(?:</code>)?</td>(.*?)</tr>", page)
    return [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)]


def test_the_page_says_how_far_how_fast_and_on_what(run):
    assert write_page(run) == run / "report.html"
    page = (run / "report.html").read_text()
    assert "<h1>a &lt;run&gt;</h1>" in page and "a <run>" not in page
    assert "5 of 10 steps. It has no export yet." in page
    assert cells(page, "devices") == ["8 x TPU v4, 2 process(es)"]
    assert cells(page, "images a second, median") == ["15"]
    assert cells(page, "time in steps, saves and pictures") == ["0 h 0 min"]  # 10 + 5 + 2 + 3 + 4 seconds
    assert cells(page, "steps skipped, their gradient not finite") == ["1"]
    assert cells(page, "2026-01-02T03:04:05Z") == ["0", "8 x TPU v4", "jax 0.10.1"]


def test_the_settings_are_set_beside_the_papers_of_the_same_training(run):
    page = write_page(run).read_text()
    assert cells(page, "student.lr") == ["3e-06", "1e-06"]
    assert cells(page, "batch_size") == ["60", "64"]
    # A LoRA's CLIP weight is the paper's, and a mesh is no part of a recipe.
    assert "<td><code>clip.weight" not in page and "<td><code>mesh.fsdp" not in page
    assert "&quot;mesh.fsdp&quot;: 4" in page


def test_the_page_needs_no_other_file_and_shows_the_samples_of_the_whole_run(run):
    page = write_page(run, run.parent / "elsewhere.html").read_text()
    addresses = re.findall(r'(?:src|href)="(.{20})', page)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert "http" not in re.sub(r'"data:.*?"', "", page)
    steps = [int(step) for step in re.search('data-steps="(.*?)"', page)[1].split(",")]
    assert len(steps) == 24 and (steps[0], steps[-1]) == (0, 58) and steps == sorted(steps)
    shown = re.findall(
        r'alt="samples of step (\d+)" src="data:image/webp;base64,(.*?)"( class=shown)?>', page
    )
    assert [int(step) for step, _, _ in shown] == steps and [bool(last) for *_, last in shown] == [
        False
    ] * 23 + [True]
    assert Image.open(io.BytesIO(base64.b64decode(shown[0][1]))).size == (16, 8)


@needs_browser
def test_the_slider_shows_the_samples_of_each_step(run):
    with opened(write_page(run).as_uri()) as page:

        def shown():
            return page.locator(".samples img:visible").evaluate_all("found => found.map(one => one.alt)")

        assert shown() == ["samples of step 58"] and page.locator(".samples output").inner_text() == "58"
        page.locator(".samples input").fill("0")
        assert shown() == ["samples of step 0"] and page.locator(".samples output").inner_text() == "0"
        broken = "found => found.filter(one => one.offsetParent && !one.naturalWidth).length"
        assert page.locator("img").evaluate_all(broken) == 0


def test_metrics_are_found_in_the_order_in_which_they_are_read():
    lines = [
        {"step": 1, "lr/x": 1.0, "loss/b": 2.0},
        {"step": 4, "own": 5.0, "loss/b": None, "latents/std": 1.0},
    ]
    found = metrics_of(lines)
    assert list(found) == ["loss/b", "latents/std", "lr/x", "own"]
    assert found["loss/b"] == ([1, 4], [2.0, None]) and found["own"] == ([4], [5.0])


@pytest.mark.parametrize("count", [1, 5000])
def test_a_curve_of_any_length_is_small_and_the_same_each_time(rng, count):
    values = [None, *rng.standard_normal(count).tolist()]
    picture = curve("loss/x", range(count + 1), values, {"limit": 1.5})
    assert picture == curve("loss/x", range(count + 1), values, {"limit": 1.5})
    assert picture.startswith(b"<?xml") and len(picture) < 100_000 and b"limit" in picture


def test_a_curve_without_one_finite_value_is_drawn(rng):
    assert b"loss/x" in curve("loss/x", range(900), [None] * 900, {})


def test_a_run_that_has_only_begun_has_a_page(run):
    for name in ("metrics.jsonl", "starts.jsonl"):
        (run / name).unlink()
    assert "0 of 10 steps" in write_page(run).read_text()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run of launch/train.py: it has no config.json"):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())
