"""What `launch/generate.py` refuses to draw, before the model is loaded and with nothing written."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked_commands import forks
from made_run import STEP, make_run
from PIL import Image
from tiny_pipeline import write_pipeline

from sbv2_jax.errors import InputError
from sbv2_jax.generate.draw import draw
from sbv2_jax.generate.pictures import PngWriter, save_png
from sbv2_jax.run import drawn

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "prompts": ["a dog", "dog"], "prompts_file": None, "num": 1, "seed": 0, "noise_file": None, "steps": 1,
    "guidance": 1.0, "sampler": "dpm", "batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_pipeline(tmp_path_factory.mktemp("draw")))


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(drawn, "load", refuse)


def opened(model: str):
    return functools.partial(drawn.drawn_of, model)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_pictures_of_other_settings_are_not_taken_for_these(model, tmp_path, rng, capsys):
    out = tmp_path / "out"
    draw(opened(model), str(out), **SETTINGS)
    before = files_of(out)
    assert before.keys() == {"00000.png", "00001.png", "settings.json"}
    assert json.loads(before["settings.json"])["model"] == model
    np.save(tmp_path / "noise.npy", rng.standard_normal((2, 8, 8, 4), np.float32))
    (tmp_path / "more.txt").write_text("a dog\ncat\n")
    for changed, message in (
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"guidance": 2.5, "steps": 4}, r"steps is 1 there, 4 here; guidance is 1\.0 there, 2\.5 here"),
        ({"sampler": "ddim"}, "sampler is 'dpm' there, 'ddim' here"),
        ({"prompts": ["a dog", "cat"]}, "prompts differ"),
        ({"prompts": [], "prompts_file": str(tmp_path / "more.txt")}, "prompts differ"),
        ({"prompts": ["a dog"], "num": 2}, "prompts differ; num is 1 there, 2 here"),
        ({"noise_file": str(tmp_path / "noise.npy")}, "noise differs"),
    ):
        with pytest.raises(InputError, match=f"pictures of other settings.*{message}") as caught:
            draw(opened(model), str(out), **SETTINGS | changed)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="model is '.*' there, 'bundled' here"):
        draw(opened("bundled"), str(out), **SETTINGS)
    assert files_of(out) == before
    capsys.readouterr()
    (out / "00001.png").unlink()
    draw(opened(model), str(out), **SETTINGS | {"batch_size": 1})
    assert files_of(out).keys() == before.keys() and capsys.readouterr().out == f"1 picture(s): {out}\n"


def test_pictures_of_unknown_settings_are_not_taken_for_these(no_model, tmp_path):
    save_png(tmp_path / "out" / "00000.png", np.zeros((8, 8, 3), np.uint8))
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="out holds pictures, and no settings.json"):
        draw(opened("bundled"), str(tmp_path / "out"), **SETTINGS)
    assert files_of(tmp_path) == before


def test_a_name_with_a_dot_is_a_directory_unless_it_is_another_kind_of_picture(model, tmp_path, no_model):
    for name in ("one.jpg", "one.JPEG", "one.webp", "one.gif", "one.bmp", "one.tif", "one.tiff"):
        with pytest.raises(InputError, match=f"--out=.*{name}: only .png files are written"):
            draw(opened(model), str(tmp_path / name), **SETTINGS)
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(InputError, match=f"cannot write --out=.*{name}: Not a directory"):
            draw(opened(model), str(tmp_path / name), **SETTINGS)
    assert files_of(tmp_path) == {"file": b""}


def test_both_kinds_of_names_are_drawn_to(model, tmp_path):
    (tmp_path / "sd2.1").mkdir()
    for name in ("sd1.5", "sd2.1"):
        draw(opened(model), str(tmp_path / name), **SETTINGS)
        assert len(list((tmp_path / name).glob("*.png"))) == 2
    draw(opened(model), str(tmp_path / "deep" / "one.PNG"), **SETTINGS)
    assert (tmp_path / "deep" / "one.PNG").is_file()


@pytest.mark.parametrize("name", ["one.png", "deep/one.png", "pictures", "deep/pictures"])
def test_what_cannot_be_written_is_told_before_the_model_is_loaded(no_model, name):
    # Not even root makes a file there.
    with pytest.raises(InputError, match=f"cannot write --out=/proc/self/fdinfo/{name}: ") as caught:
        draw(opened("bundled"), f"/proc/self/fdinfo/{name}", **SETTINGS)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_where_the_model_or_the_noise_is_wrong(model, tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((2, 4, 4, 4), np.float32))
    for name, noise in (("nowhere", None), (model, str(tmp_path / "noise.npy"))):
        with pytest.raises(InputError, match="does not exist|is expected"):
            draw(opened(name), str(tmp_path / "out"), **SETTINGS | {"noise_file": noise})
    assert files_of(tmp_path).keys() == {"noise.npy"} and not (tmp_path / "out").exists()


def noise_file(path: Path, kind: str) -> None:
    if kind == "empty":
        path.touch()
    elif kind == "zip":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, first=np.zeros((8, 8, 4)), second=np.zeros((8, 8, 4)))
    else:
        array = np.zeros(
            {"scalar": (), "flat": (2, 8), "few": (1, 8, 8, 4)}.get(kind, (2, 8, 8, 4)), np.float32
        )
        if kind == "nan":
            array[1, 0, 0, 0] = np.nan
        with open(path, "wb") as file:
            np.save(file, array.astype(np.float64) if kind == "double" else array)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file"),
        ("empty", "EOF: reading magic string"),
        ("zip", "magic string is not correct"),
        ("npz", "magic string is not correct"),
        ("scalar", r"float32 \(\): finite float32 \[2, h, w, c\] is expected"),
        ("flat", r"float32 \(2, 8\): finite"),
        ("few", r"float32 \(1, 8, 8, 4\): finite float32 \[2, h, w, c\]"),
        ("double", r"float64 \(2, 8, 8, 4\): finite"),
        ("nan", r"float32 \(2, 8, 8, 4\): finite"),
    ],
)
def test_a_file_that_is_no_noise_is_one_line(no_model, tmp_path, kind, message):
    path = tmp_path / "noise.npy"
    if kind != "missing":
        noise_file(path, kind)
    with pytest.raises(InputError, match=f"^--noise={path}: .*{message}") as caught:
        draw(opened("bundled"), str(tmp_path / "out"), **SETTINGS | {"noise_file": str(path)})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_seed_beyond_32_bits_is_refused_on_the_command_line(tmp_path):
    command = [sys.executable, "launch/generate.py", "--model=bundled", "--prompt=dog"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'one.png'}", f"--seed={2**32}"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"--seed={2**32}" in done.stderr


@pytest.mark.parametrize("limit", [100, 0])
@pytest.mark.slow
def test_a_picture_that_finds_no_room_is_one_line_and_leaves_nothing(tmp_path, limit):
    script = """
import resource, sys
import numpy as np
from sbv2_jax import cli
from sbv2_jax.generate.pictures import PngWriter, save_png
from sbv2_jax.run import drawn
def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # as on a full disk
    save_png(sys.argv[1], np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
try:
    main()
except cli.InputError as error:
    cli.fail(str(error))
"""
    path = tmp_path / "one.png"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(limit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {path}: File too large\n")
    assert not any(tmp_path.iterdir())


def test_prompts_that_are_cut_are_told(model, tmp_path, caplog):
    draw(opened(model), str(tmp_path / "one.png"), **SETTINGS | {"prompts": ["dog " * 40, "dog"]})
    assert "1 of 2 prompts are longer than 12 tokens and are cut" in caplog.text


@pytest.mark.slow
def test_a_prompt_by_flag_and_the_same_by_file_are_one_picture(model, tmp_path):
    prompts = ["a\u200b red\t apple\x07", "\u202ea  dog "]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "p.csv").write_text(
        "id,words\n" + "\n".join(f"1,{text}" for text in prompts), encoding="utf-8"
    )
    (tmp_path / "p.json").write_text(json.dumps([{"caption": text} for text in prompts]))
    out = tmp_path / "out"
    draw(opened(model), str(out), **SETTINGS | {"prompts": prompts})
    before = files_of(out)
    assert before["00000.png"] != before["00001.png"]
    (out / "00001.png").unlink()  # drawn again, and the settings beside it are found to be the same
    draw(opened(model), str(out), **SETTINGS | {"prompts": [], "prompts_file": str(tmp_path / "p.txt")})
    assert files_of(out).keys() == before.keys()
    for name, column in (("p.txt", ""), ("p.csv", "words"), ("p.json", "")):
        file = {"prompts": [], "prompts_file": str(tmp_path / name), "column": column}
        draw(opened(model), str(tmp_path / f"{name}.png"), **SETTINGS | file)
    draw(opened(model), str(tmp_path / "flag.png"), **SETTINGS | {"prompts": prompts})
    want = (tmp_path / "flag.png").read_bytes()
    assert all((tmp_path / f"{name}.png").read_bytes() == want for name in ("p.txt", "p.csv", "p.json"))


def test_guidances_that_are_none_are_the_same_settings(model, tmp_path):
    draw(opened(model), str(tmp_path), **SETTINGS)
    before = files_of(tmp_path)
    for guidance in (0, 0.5):
        draw(opened(model), str(tmp_path), **SETTINGS | {"guidance": guidance})
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"guidance": float("nan")}, {"seed": -1}, {"steps": 0}])
def test_numbers_that_are_none_are_refused_before_the_model_is_loaded(no_model, tmp_path, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}=.* is expected"):
        draw(opened("bundled"), str(tmp_path / "out"), **SETTINGS | wrong)


def test_a_prompt_that_is_not_utf_8_is_one_line(no_model, tmp_path):
    with pytest.raises(InputError, match="a --prompt is not UTF-8"):
        draw(opened("bundled"), str(tmp_path / "out"), **SETTINGS | {"prompts": ["caf\udce9"]})


def test_the_column_that_was_guessed_is_told(model, tmp_path, caplog):
    (tmp_path / "p.csv").write_text("id,caption\n1,dog\n")
    draw(
        opened(model),
        str(tmp_path / "one.png"),
        **SETTINGS | {"prompts": [], "prompts_file": str(tmp_path / "p.csv")},
    )
    assert "p.csv: the prompts are its column 'caption', of id, caption" in caplog.text


@pytest.mark.slow
def test_the_column_of_a_file_at_home_is_a_flag(tmp_path):
    (tmp_path / "p.csv").write_text("text,caption\ncat,dog\n")
    command = ["launch/generate.py", "--model=nowhere", "--prompts=~/p.csv", "--out=/tmp/none.png"]
    for flags, message in (
        (
            [],
            f"{tmp_path}/p.csv: each of its columns text, caption may hold the prompts: name it by --column",
        ),
        (["--column=caption"], "nowhere does not exist"),
    ):
        done = forks().run([*command, *flags], ROOT, {"HOME": str(tmp_path)})
        assert (done.code, done.said.count("\n")) == (2, 1)
        assert done.said.startswith("error: ") and message in done.said


def test_pictures_are_written_while_the_next_are_drawn_and_errors_are_told(tmp_path, rng):
    pictures = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    with PngWriter() as files:
        files.write([tmp_path / f"{n}.png" for n in range(3)], pictures[:3])
        files.write([tmp_path / f"{n}.png" for n in (3, 4)], pictures[3:])
    assert all(np.array_equal(Image.open(tmp_path / f"{n}.png"), pictures[n]) for n in range(5))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*file/0.png"), PngWriter() as files:
        files.write([tmp_path / "file" / "0.png"], pictures[:1])


@pytest.mark.slow
def test_sizes_negative_prompts_and_precision_are_of_the_settings(model, tmp_path):
    out = tmp_path / "out"
    draw(
        opened(model),
        str(out),
        **SETTINGS | {"height": 16, "negative_prompt": "apple", "precision": "bfloat16"},
    )
    assert Image.open(out / "00000.png").size == (32, 16)
    said = json.loads((out / "settings.json").read_text())
    assert (said["height"], said["negative_prompt"], said["negative_scale"]) == (16, "apple", 0.5)
    with pytest.raises(
        InputError, match="height is 16 there, None here; negative_prompt is 'apple' there, None here"
    ):
        draw(opened(model), str(out), **SETTINGS)
    for wrong, message in (
        ({"height": 20}, "height=20: a multiple of 8 pixels is expected"),
        ({"width": 0}, "width=0: a multiple of 8 pixels"),
        ({"negative_scale": -1.0}, "negative_scale=-1.0: a finite number >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            draw(opened(model), str(tmp_path / "none"), **SETTINGS | wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_is_drawn_by_its_newest_averaged_student(tmp_path):
    write_pipeline(tmp_path)
    made = make_run(tmp_path, "run")
    draw(opened(str(made.directory)), str(tmp_path / "run.png"), **SETTINGS)
    draw(opened(str(made.directory / "export")), str(tmp_path / "export.png"), **SETTINGS)
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "export.png").read_bytes()
    draw(opened(str(made.directory)), str(tmp_path / "out"), **SETTINGS)
    model = json.loads((tmp_path / "out" / "settings.json").read_text())["model"]
    assert model == f"{made.directory} (ema of step {STEP})"
