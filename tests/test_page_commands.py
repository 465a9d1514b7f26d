"""The commands of the pages, run as they stand there, in order, in a small world: only sizes are others.

A page's names (`checkpoints/sd-turbo`, `DIR`, `prompts.txt`) are files of that world in a directory of the page's own.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from commands_not_run import NOT_RUN
from documented import block, commands, shell_lines
from forked_commands import ROOT, forks
from made_openclip import original_tensors, write
from parity import randomised
from PIL import Image
from safetensors.numpy import load_file
from their_judges import random_inception
from tiny_pipeline import write_world
from transformers import CLIPConfig, CLIPModel

pytestmark = pytest.mark.slow

STEPS = 2
TRAIN = {
    "config.architecture": "",
    "config.resolution": 0,
    "config.batch_size": 4,
    "config.steps": STEPS,
    "config.checkpoint.every": 1,
    "config.sample.every": 0,  # pictures take longer to compile than all else; tests/run/test_progress.py draws them
    "config.score.rank": 2,
    "config.student.lora.rank": 2,
}
# What makes a program's commands small: flags that take the place of the page's, or are added.
SIZES: dict[str, Mapping[str, object]] = {
    "launch/train.py": TRAIN,
    "launch/compile.py": TRAIN | {"topology": "v4:2x2x1"},
    "launch/pairs.py": {"count": 5, "steps": 2, "batch_size": 5},
    # Inception has one size, and takes a minute (tests/evaluate/test_evaluation.py): a small CLIP is in its place.
    "launch/evaluate.py": {"count": 6, "inception": None, "clip": "checkpoints/openclip-vit-b-32"},
}
CLIP_TEXT = {"context_length": 12, "vocab_size": 522, "width": 12, "heads": 2, "layers": 1}
CLIP_VISION = {
    "image_size": 32,
    "patch_size": 16,
    "width": 12,
    "layers": 1,
    "head_width": 6,
    "mlp_ratio": 2.0,
}


def shrunk(words: list[str], sizes: Mapping[str, object]) -> list[str]:
    """Returns a command with other sizes; where it names one itself, in the place of that."""
    words = [
        word for word in words if re.match(r"--([\w.]+)", word) is None or word[2:].split("=")[0] not in sizes
    ]
    return words + [f"--{name}={value}" for name, value in sizes.items() if value is not None]


def run_page(
    environment: Mapping[str, str],
    desk: Path,
    page: str,
    sizes: Mapping[str, Mapping[str, object]] | None = None,
) -> dict[str, str]:
    """Runs a page's commands in a directory, but for those of NOT_RUN; returns what each of them said.

    `sizes` has those of single commands, by a part of theirs.
    """
    said = {}
    for line in shell_lines(ROOT / page):
        if any(part in line for part in NOT_RUN.get(page, ())):
            continue
        for command in commands(line):
            words = shlex.split(command, comments=True)[1:]
            own = [one for part, one in (sizes or {}).items() if part in line]
            done = forks().run(
                shrunk(words, SIZES.get(words[0], {}) | (own[0] if own else {})), desk, environment
            )
            assert done.code == 0, f"{line}\n{done.said}"
            said[re.sub(" +", " ", command)] = done.said
    return said


def desk(directory: Path, names: Mapping[str, Path]) -> Path:
    """Makes a directory where a page's commands find the programs, and files by the names that the page has."""
    for name, path in {"launch": ROOT / "launch", "configs": ROOT / "configs", **names}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(path)
    return directory


def unet(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """The environment of the commands: the user's cache is a directory of these tests."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("home") / "cache")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What one would download: a pipeline, prompts, files of OpenCLIP, Inception and HPSv2, captioned photographs."""
    directory = write_world(tmp_path_factory.mktemp("world"))
    text = {
        "hidden_size": 12, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
        "vocab_size": 522, "max_position_embeddings": 12, "eos_token_id": 521, "bos_token_id": 520,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    clip = randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    sizes = {"embed_dim": 8, "text_cfg": CLIP_TEXT, "vision_cfg": CLIP_VISION, "quick_gelu": True}
    write(directory / "openclip", original_tensors(clip), **sizes)
    for path in (directory / "pipeline" / "tokenizer").iterdir():
        shutil.copy(path, directory / "openclip")
    state = {name: torch.from_numpy(one) for name, one in original_tensors(clip).items()}
    torch.save({"state_dict": state}, directory / "HPS_v2_compressed.pt")
    random_inception(directory / "inception.pth")
    rng = np.random.default_rng(0)
    (directory / "val2014").mkdir()
    for index in range(6):
        picture = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(picture).save(directory / "val2014" / f"COCO_{index:03d}.jpg")
    captions = [
        {"image_id": index, "id": index, "caption": f"a red dog and {index} apples"} for index in range(9)
    ]
    (directory / "captions_val2014.json").write_text(json.dumps({"images": [], "annotations": captions}))
    return directory


@pytest.fixture(scope="module")
def checkpoints(cache, world, tmp_path_factory) -> Path:
    """The page of the checkpoints, with what `hf download` would have put there."""
    pipeline = world / "pipeline"
    names = {
        "checkpoints/stable-diffusion-2-1-base": pipeline,
        "checkpoints/sd-turbo": pipeline,
        "checkpoints/taesd": pipeline / "vae_tiny",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": world / "openclip",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": world / "openclip",
        "HPS_v2_compressed.pt": world / "HPS_v2_compressed.pt",
        "pt_inception-2015-12-05-6726825d.pth": world / "inception.pth",
    }
    directory = desk(tmp_path_factory.mktemp("checkpoints"), names)
    assert len(run_page(cache, directory, "docs/checkpoints.md")) == 3
    return directory / "checkpoints"


@pytest.fixture(scope="module")
def paper(cache, world, checkpoints, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The page that repeats the paper, on the checkpoints of the page that it links to."""
    names = {
        "annotations/captions_val2014.json": world / "captions_val2014.json",
        "val2014": world / "val2014",
        "pt_inception-2015-12-05-6726825d.pth": world / "inception.pth",
    }
    directory = desk(tmp_path_factory.mktemp("paper"), names)
    shutil.copytree(checkpoints, directory / "checkpoints", symlinks=True)
    shutil.rmtree(directory / "checkpoints" / "inception")  # the page makes it again
    rows = [{"prompt": "a red\napple"}, {"prompt": "a dog"}, {"prompt": "a red apple"}, {"prompt": None}, {}]
    rows += [{"prompt": f"{number} apples"} for number in range(3)]
    (directory / "train_anno_realease_repath.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subprocess.run([sys.executable, "-c", block("docs/reproduce.md", "prompts")], cwd=directory, check=True)
    return directory, run_page(cache, directory, "docs/reproduce.md")


def test_none_of_the_commands_that_repeat_the_paper_is_left_out(paper):
    assert len(paper[1]) == len(shell_lines(ROOT / "docs/reproduce.md")) == 9


def test_each_prompt_of_journeydb_is_taken_once(paper):
    prompts = (paper[0] / "data/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == ["a red apple", "a dog", "0 apples", "1 apples", "2 apples"]


def test_the_checkpoints_are_where_the_configs_expect_them(checkpoints, world):
    (converted,) = (checkpoints / "openclip-vit-b-32").glob("*.safetensors")
    ours, theirs = load_file(converted), load_file(world / "openclip" / "open_clip_model.safetensors")
    np.testing.assert_array_equal(
        ours["text_model.embeddings.token_embedding.weight"], theirs["token_embedding.weight"]
    )


def test_the_plan_of_the_paper_s_runs_says_what_is_held_and_that_it_fits(paper):
    said = paper[1]
    (held,) = [text for line, text in said.items() if "--dry_run" in line]
    (planned,) = [text for line, text in said.items() if "launch/compile.py" in line]
    assert "batch 4 in 1 part(s)" in held and "student, EMA" in held
    assert "v4:2x2x1: 4 devices" in planned and "fits: " in planned


def test_the_paper_s_trainings_are_of_the_terms_that_the_page_says(paper):
    runs = paper[0] / "runs"
    terms = {
        "full": {"loss/vsd", "loss/score"},
        "lora": {"loss/vsd", "loss/score", "loss/clip"},
        "regularised": {"loss/vsd", "loss/score", "loss/regression"},
    }
    for name, expected in terms.items():
        rows = metrics(runs / name)
        assert [row["step"] for row in rows] == [1, STEPS]
        assert {key for key in rows[-1] if key.startswith("loss/")} == expected, name
        assert all(np.isfinite(row["loss/vsd"]) for row in rows)
        # What the page says to look at after an hour.
        watched = {"latents/std", "skipped"} | ({"clip/clamped"} if name == "lora" else set())
        assert watched <= rows[-1].keys()
        assert rows[-1]["skipped"] == 0
    assert json.loads((runs / "pairs" / "manifest.json").read_text())["count"] == 5


def test_every_curve_of_a_run_is_explained(paper):
    page = (ROOT / "docs/curves.md").read_text(encoding="utf-8")
    for name in ("full", "lora", "regularised"):
        curves = metrics(paper[0] / "runs" / name)[-1].keys() - {"step"}
        assert [one for one in curves if f"`{one}`" not in page] == []


def test_a_small_gpu_is_told_what_is_held_and_trains_in_parts(cache, paper, checkpoints, world, tmp_path):
    names = {"checkpoints": checkpoints, "prompts.txt": world / "prompts.txt"}
    sizes = {"accumulate": {"config.accumulate": 2}}
    held, trained, shortened = run_page(cache, desk(tmp_path, names), "docs/small_gpu.md", sizes).values()
    assert "clip, frozen" in held and "student, EMA" not in shortened
    assert json.loads((tmp_path / "runs/small/config.json").read_text())["accumulate"] == 2
    assert "loss/clip" in metrics(tmp_path / "runs/small")[-1]


def test_the_merge_is_half_of_each_training_and_is_measured(paper):
    runs = paper[0] / "runs"
    full, low, merged = (unet(path) for path in (runs / "full/export", runs / "lora/export", runs / "merged"))
    start = unet(paper[0] / "checkpoints" / "sd-turbo")
    moved = [name for name in merged if not np.array_equal(full[name], start[name])]
    assert len(moved) == len(merged), "every weight is trained"
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, (full[name] + low[name]) / 2, rtol=0, atol=1e-6, err_msg=name)
    report = json.loads((runs / "measured" / "report.json").read_text())
    (source,) = report["sources"]
    assert -1 < source["figures"]["clip"]["CLIP score"]["value"] < 1
    assert any("--inception" in line for line in report["not_measured"])


def test_what_is_said_of_a_run_after_training(cache, paper, world):
    """In the directory where the paper was repeated, for the runs know their teacher by its path there."""
    pipeline, work = world / "pipeline", paper[0]
    for name in ("START", "DIR", "TEACHER"):
        (work / name).symlink_to(pipeline)
    (work / "prompts.txt").symlink_to(world / "prompts.txt")
    sizes = {
        "--step=": {"step": STEPS},
        "extract-lora": {"rank": 2},
        "--steps=25": {"steps": 2},
        "--height=": {"height": 32, "width": 48},
    }
    said = run_page(cache, work, "docs/after_training.md", sizes)
    assert len(said) == 11
    # The student's LoRA on what it started from is the student.
    fused, low = unet(work / "fused"), unet(work / "runs/lora/export")
    for name in low:
        np.testing.assert_allclose(fused[name], low[name], rtol=0, atol=1e-6, err_msg=name)
    assert all(
        np.array_equal(tensor, unet(work / "runs/merged")[name])
        for name, tensor in unet(work / "merged").items()
    )
    assert all(
        np.array_equal(tensor, unet(pipeline)[name]) for name, tensor in unet(work / "teacher").items()
    )
    with Image.open(work / "wide.png") as wide, Image.open(work / "one.png") as one:
        assert (wide.size, one.size) == ((48, 32), (32, 32))
    assert len(list((work / "pictures").glob("*.png"))) == 5
    # On the same directory: a LoRA of an earlier command as the style, and another by a name as the hub's.
    (work / "style.safetensors").symlink_to(work / "student.safetensors")
    (work / "OWNER/NAME").mkdir(parents=True)
    shutil.copy(work / "student.safetensors", work / "OWNER/NAME")
    (work / "DIR_OR_ID").symlink_to(pipeline)
    (work / "OPENCLIP_DIR_OR_ID").symlink_to(world / "openclip")
    assert len(run_page(cache, work, "docs/training.md")) == 7
    styled, start = unet(work / "styled"), unet(pipeline)
    for name in low:
        np.testing.assert_allclose(
            styled[name] - start[name], 1.7 * (low[name] - start[name]), rtol=0, atol=1e-6
        )
    for path in sorted((work / "back" / "unet").glob("*.safetensors")):
        assert path.read_bytes() == (pipeline / "unet" / path.name).read_bytes()


def test_the_readme_distils_merges_and_draws(cache, world, tmp_path):
    names = {
        "DIR_OR_ID": world / "pipeline",
        "prompts.txt": world / "prompts.txt",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": world / "openclip",
        "madebyollin/taesd": world / "pipeline/vae_tiny",
    }
    said = run_page(cache, desk(tmp_path, names), "README.md")
    assert len(said) == 5
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (32, 32)
