"""What a model may be named by, and that the network is asked only where it should be."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbv2_jax.convert.formats import resolve as resolving
from sbv2_jax.convert.formats.resolve import is_hub_id, resolve
from sbv2_jax.errors import InputError


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_directories_resolve_to_themselves_and_missing_paths_are_named_at_once(tmp_path, monkeypatch, no_hub):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/first") == Path("runs/first") and resolve(tmp_path) == tmp_path
    start = time.perf_counter()
    for missing in (
        "./nowhere", "/nowhere/at/all", "a/b/c", "runs/second", "nowhere", "~/no/such", "../x/y", "owner/",
        "/x\0y", "owner/na me", "x" * 5000, Path("owner/name"), "owner\\name", "https://hub/owner/name",
    ):  # fmt: skip
        with pytest.raises(InputError, match="does not exist") as caught:
            resolve(missing)
        assert str(missing).removeprefix("~") in str(caught.value)
    with pytest.raises(InputError, match="file is a file"):
        resolve("file")
    with pytest.raises(InputError, match="empty"):
        resolve(" ")
    assert time.perf_counter() - start < 1


def test_a_hub_id_is_fetched_as_safetensors_and_text_only(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, **kwargs):
        asked.update(kwargs, repository=repository)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("some-owner/some.model") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("some-owner/some.model", None)
    resolve("owner/model@v1.0")
    assert (asked["repository"], asked["revision"]) == ("owner/model", "v1.0")

    from huggingface_hub.utils import filter_repo_objects

    files = [
        "README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt", "v2-1_768-ema-pruned.safetensors", "v2-1_768-ema-pruned.ckpt",
        "safety_checker/model.safetensors", "evil.py", "model.safetensors", "unet/model.onnx",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    ]  # fmt: skip
    taken = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(taken) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors",
        "tokenizer/merges.txt", "model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    ]  # fmt: skip


@pytest.mark.parametrize("start", ["./", "../", "/", "~/"])
def test_a_name_that_begins_as_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch, no_hub, start):
    """In a clone without ./checkpoints too, where nothing of the path is there."""
    monkeypatch.chdir(tmp_path)
    for rest in ("checkpoints/stable-diffusion-2-1-base", "checkpoints", "owner/name@v1"):
        with pytest.raises(InputError, match="^" + re.escape(f"{start}{rest} does not exist") + "$"):
            resolve(start + rest)
        assert not is_hub_id(start + rest)


def test_a_failing_hub_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        InputError, match="owner/name is no local directory.*no route to host and more"
    ) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_offline_a_hub_id_is_an_error_of_one_line(tmp_path):
    program = "from sbv2_jax.convert.formats.resolve import resolve\nresolve('owner/name')"
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert (
        "InputError: owner/name is no local directory, and could not be fetched"
        in done.stderr.splitlines()[-1]
    )


def test_the_bundled_pipeline(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(resolving, "_BUNDLED", tmp_path)
    with pytest.raises(InputError, match="the bundled pipeline is missing"):
        resolve("bundled")
    (tmp_path / "model_index.json").write_text("{}")
    assert resolve("bundled") == tmp_path
