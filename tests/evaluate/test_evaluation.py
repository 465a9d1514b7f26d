"""The evaluation as a whole: the command on a made-up COCO directory, killed and gone on; sweeps, merges, folders."""

import dataclasses
import io
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_commands import forks
from PIL import Image
from scipy import linalg
from their_judges import cleanfid, random_inception
from tiny_pipeline import SMALL_UNET, write_pipeline, write_world

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.pipeline import save_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.inception import convert
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import curves, presets, sources
from sbv2_jax.evaluate.intervals import Interval
from sbv2_jax.evaluate.measure import Evaluation, Row, evaluate
from sbv2_jax.evaluate.protocol import Protocol
from sbv2_jax.run import evaluation
from sbv2_jax.run.drawn import pair_of

ROOT = Path(__file__).parents[2]
PROMPTS = 150  # three pieces


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A directory as COCO's: captions, and photographs of several shapes."""
    directory = write_world(tmp_path_factory.mktemp("coco"))
    rng = np.random.default_rng(0)
    words = ["a red apple", "a dog", "an apple", "red", "a red dog"]
    texts = [f"{words[rng.integers(5)]} and {words[rng.integers(5)]}" for _ in range(PROMPTS)]
    annotations = [{"image_id": index, "id": index, "caption": text} for index, text in enumerate(texts)]
    (directory / "captions_val2014.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    (directory / "val2014").mkdir()
    for index in range(20):
        shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
        save(directory / "val2014" / f"COCO_{index:03d}.jpg", wave(rng, *shape))
    return directory


def wave(rng, height, width):
    y, x = np.mgrid[0:height, 0:width] / 64
    waves = [np.sin(rng.uniform(1, 30) * x + rng.uniform(1, 30) * y) for _ in range(3)]
    return (rng.uniform(60, 200, 3) + 60 * np.stack(waves, axis=-1)).clip(0, 255).astype(np.uint8)


def save(path, picture):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(picture).save(path, quality=95)


def command(coco, out, *flags):
    clip = resolve("bundled") / "clip"
    return [
        "launch/evaluate.py", "--protocol=coco30k-sbv2", f"--prompts={coco}/captions_val2014.json",
        f"--clip={clip}", f"--count={PROMPTS}", f"--out={out}", *flags,
    ]  # fmt: skip


def start(coco, out, *flags):
    return forks().start(command(coco, out, *flags), environment={"XDG_CACHE_HOME": str(coco / "home")})


def run(coco, out, *flags):
    process = start(coco, out, *flags)
    said, error = process.communicate(timeout=600)
    return process.returncode, said, error


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_to_the_same_report(coco, tmp_path):
    """Both go to one directory in the end: the report says the command."""
    out, flags = tmp_path / "out", [f"--model={coco}/pipeline", "--guidance=1:3:1", "--seed=0", "--seed=7"]
    process = start(coco, out, *flags)
    deadline = time.monotonic() + 480
    while len(list(out.glob("features/*/*.npz"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "report.json").exists()
    there = {path: path.stat().st_mtime_ns for path in out.glob("features/*/*.npz")}
    code, said, error = run(coco, out, *flags)
    assert code == 0, error
    assert all(path.stat().st_mtime_ns == when for path, when in there.items()), (
        "what was there is not drawn again"
    )
    killed = {name: (out / name).read_bytes() for name in ("report.json", "report.html")}
    out.rename(tmp_path / "killed")
    assert run(coco, out, *flags)[0] == 0
    assert {name: (out / name).read_bytes() for name in killed} == killed

    report = json.loads(killed["report.json"])
    assert report["pictures"] == PROMPTS and len(report["sources"]) == 3 * 2
    assert any("--inception" in line for line in report["not_measured"])
    assert "not measured: FID" in said
    first = report["sources"][0]
    score = first["figures"]["clip"]["CLIP score"]
    assert -1 < score["low"] < score["value"] < score["high"] < 1
    assert {(one["settings"]["steps"], one["settings"]["guidance"]) for one in report["sources"]} == {
        (1, guidance) for guidance in (1.0, 2.0, 3.0)
    }  # fmt: skip
    # the same model by two seeds differs, and each other setting is beside the first
    assert first["figures"] != report["sources"][1]["figures"] and len(report["comparisons"]) == 2
    assert report["comparisons"][0]["seeds"] == [0, 7]


@pytest.mark.slow
def test_fid_of_the_paper_s_protocol_is_that_of_clean_fid_and_torch_fidelity(coco, tmp_path):
    """On random weights: their resize, their network, and a distance by a matrix square root in float64."""
    theirs = random_inception(tmp_path / "weights.pth")
    convert(tmp_path / "weights.pth", tmp_path / "inception")
    rng = np.random.default_rng(5)
    for index in range(24):
        save(tmp_path / "drawn" / f"{index:05d}.png", wave(rng, 64, 64))
    protocol = presets.coco30k_sbv2(
        prompts=f"{coco}/captions_val2014.json",
        real=f"{coco}/val2014",
        weights={"inception": str(tmp_path / "inception")},
        count=24,
    )
    assert [panel.label for panel in protocol.panels] == ["an inception", "inception, own resize"]
    protocol = dataclasses.replace(protocol, panels=protocol.panels[:1])
    ours = evaluate(
        protocol, [sources.of_folder(tmp_path / "drawn", 24)], tmp_path / "out", tmp_path / "cache"
    )

    resize = cleanfid("resize").build_resizer("clean")

    def features(folder):
        found = []
        for path in sorted(folder.iterdir()):
            image = Image.open(path).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (round(left), round(top), round(left) + side, round(top) + side)
            small = np.asarray(image.crop(box).resize((256, 256), Image.Resampling.LANCZOS))
            pixels = torch.from_numpy(resize(small)).permute(2, 0, 1)[None]
            found.append(theirs_of(theirs, pixels))
        return np.concatenate(found).astype(np.float64)

    real, fake = features(coco / "val2014"), features(tmp_path / "drawn")
    covariances = [np.cov(rows, rowvar=False) for rows in (real, fake)]
    # of so few pictures the covariances have no full rank: by the eigenvalues of their product
    root = np.sqrt(np.maximum(linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    want = np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(sum(covariances)) - 2 * root
    figures = ours.rows[0].figures
    assert ("inception", "FID") not in figures, "weights that are not the published ones give no FID"
    assert figures["an inception", "FD"].value == pytest.approx(want, rel=1e-3)


def theirs_of(network, pixels):
    """Features of pictures that are resized already, [1, 3, 299, 299] of 0 to 255."""
    forward = type(network).forward.__globals__
    name = "interpolate_bilinear_2d_like_tensorflow1x"
    before, forward[name] = forward[name], lambda *_, **__: pixels
    try:
        with torch.inference_mode():
            return network(torch.zeros(1, 3, 299, 299, dtype=torch.uint8))[0].numpy()
    finally:
        forward[name] = before


@pytest.mark.slow
def test_a_picture_depends_on_its_prompt_row_and_seed_alone(coco):
    specs = [
        {
            "model": f"{coco}/pipeline",
            "steps": (1,),
            "guidance": (1.0,),
            "sampler": "dpm",
            "step": None,
            "which": None,
        }
    ]
    (three,), (five,) = (list(evaluation._of_model(specs[0], [3], batch_size)) for batch_size in (3, 5))
    texts = ["a red apple", "a dog", "an apple", "red", "dog", "red dog", "apple"]
    whole = np.stack(three.draw(range(7), texts)).astype(int)
    other = np.stack(five.draw(range(2, 7), texts[2:])).astype(int)
    assert whole.std() > 5 and np.abs(whole[2:] - other).max() <= 1
    assert three.fingerprint == five.fingerprint


def test_merges_begin_and_end_with_their_models(coco, tmp_path):
    """Two UNets in one pipeline, for what is around the first one is around all merges."""
    ours, other = coco / "pipeline", tmp_path / "other"
    unet = load_component(write_pipeline(tmp_path / "made", seed=4, blocks=SMALL_UNET) / "unet")
    save_pipeline(other, base=ours, unet=unet)
    spec = {"steps": (1,), "guidance": (1.0,), "sampler": "dpm"}
    pair = pair_of(f"{ours},{other}")
    found = list(evaluation._of_merges(pair, evaluation.values("0:1:0.5", float), spec, [0], 4))
    assert [one.settings["weight"] for one in found] == [0.0, 0.5, 1.0]
    texts = ["a red apple", "a dog", "an apple", "red"]

    def drawn(source):
        return np.stack(source.draw(range(4), texts)).astype(int)

    alone = {}
    for model in (other, ours):
        (alone[model],) = evaluation._of_model(
            {"model": str(model), "step": None, "which": None, **spec}, [0], 4
        )
    assert np.abs(drawn(found[0]) - drawn(alone[other])).max() <= 1
    assert np.abs(drawn(found[2]) - drawn(alone[ours])).max() <= 1
    for end in (found[0], found[2]):
        assert np.abs(drawn(found[1]) - drawn(end)).max() > 5


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("1,4,25", int, (1, 4, 25)),
        ("1:7.5:0.5", float, tuple(1 + 0.5 * index for index in range(14))),
        ("0:1:0.1", float, tuple(index / 10 for index in range(11))),
        ("2:3:5", int, (2,)),
        ("3,3", int, (3,)),
    ],
)
def test_ranges_hold_both_ends(text, kind, numbers):
    assert evaluation.values(text, kind) == numbers


@pytest.mark.parametrize("text", ["", "a", "1:2", "2:1:0.5", "0:1:0", "0:1:-1", "0:1:1e-9", "nan:1:1", ","])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(InputError):
        evaluation.values(text, float)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --model, --merge or --pictures"),
        (("--model=/nowhere",), "/nowhere does not exist"),
        (("--model={}/pipeline,step=3",), "step and which are of a run"),
        (("--model={}/pipeline,setps=3",), "did you mean steps?"),
        (("--model={}/pipeline,sampler=euler",), "the sampler is 'ddim', 'dpm' or 'lcm'"),
        (("--model={}/pipeline,steps=0",), "steps=0: a whole number >= 1 is expected"),
        (("--merge={}/pipeline",), "two models are expected"),
        (("--merge={0}/pipeline,{0}/pipeline", "--steps=0"), "steps=0: a whole number >= 1 is expected"),
        (("--model={}/pipeline", "--weight=0.5"), "--weight is of a --merge"),
        (("--model={}/pipeline", "--images=2", "--split=test"), "does not take --images, --split"),
        (("--pictures={}/val2014",), "holds 20 pictures, and the protocol has 150 prompts"),
        (("--pictures=real",), "has no real pictures of its prompts"),
        (("--model={}/pipeline", "--real={}/none"), "/none does not exist"),
        (
            ("--model={}/pipeline", "--inception={}/pipeline/unet"),
            "--inception: distances to real pictures need",
        ),
        (
            ("--model={}/pipeline", "--real={}/val2014", "--inception={}/pipeline/unet"),
            "InceptionConfig is expected",
        ),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_nothing_is_written(coco, tmp_path, flags, message):
    given = [flag.format(coco) for flag in flags]
    code, _, error = run(coco, tmp_path / "out", *given)
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and message in lines[0], error
    assert not (tmp_path / "out").exists()


def test_hpsv2_prompts_are_of_the_style_of_their_file(tmp_path):
    for style, texts in {"anime": ["a", "b"], "photo": ["c", "d", "e"]}.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    protocol = presets.hpsv2(prompts=f"{tmp_path}/*.json", weights={"hpsv2": "somewhere"})
    assert list(protocol.prompts) == ["a", "b", "c", "d", "e"]
    (metric,) = protocol.panels[0].metrics
    assert list(metric.styles) == ["anime"] * 2 + ["photo"] * 3
    assert protocol.panels[0].name("hpsv2, anime") == "HPSv2, anime"
    with pytest.raises(InputError, match="HPSv2 needs --hpsv2"):
        presets.hpsv2(prompts=f"{tmp_path}/*.json", weights={})


def test_curves_are_of_sweeps_of_three_points(tmp_path):
    def row(value, **settings):
        figures = {("i", "FID"): Interval(value), ("c", "CLIP score"): Interval(value / 9)}
        figures |= {("i", "precision"): Interval(0.1), ("i", "recall"): Interval(0.2)}
        return Row(name="m", settings=settings, fingerprint="", figures=figures, directory=tmp_path, rate=0.0)

    def drawn(rows):
        protocol = Protocol(
            name="p", prompts=["a", "b"], of=np.arange(2), panels=(), prepare=lambda one: one, prepared=""
        )
        evaluation = Evaluation(protocol=protocol, rows=rows, comparisons=[], references={}, better={})
        found = curves.draw(evaluation)
        assert all(Image.open(io.BytesIO(picture)).size[0] > 500 for picture in found.values())
        return set(found)

    guided = [row(9.0 - w, model="m", steps=4, guidance=w, seed=0) for w in (1.0, 2.0, 3.0)]
    assert drawn(guided) == {"i_fid_against_c_clip_score", "i_precision_against_i_recall"}
    assert drawn(guided[:2]) == set() and drawn([row(1.0, pictures="real")]) == set()
    merged = [row(9.0 - w, model="m", steps=1, guidance=1.0, seed=0, weight=w) for w in (0.0, 0.5, 1.0)]
    assert {"i_fid_over_the_weight", "c_clip_score_over_the_weight"} <= drawn(merged)
