"""The conversions of a run's checkpoints, through the command and the functions beneath it."""

import dataclasses
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import pytest
from conftest import relative_error
from made_run import STEP, Made, command, make_run
from safetensors.numpy import load_file, save_file
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.convert import inspection as listing
from sbv2_jax.convert.formats.component import load_component, save_component
from sbv2_jax.convert.lora.files import read_lora
from sbv2_jax.convert.lora.fuse import fuse
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.registry import network
from sbv2_jax.run.conversions import COMMANDS
from sbv2_jax.run.export import export_checkpoint, export_lora

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    write_pipeline(directory)
    return directory


@pytest.fixture(scope="module")
def full(world) -> Made:
    """All weights trained, with an average."""
    return make_run(world, "full")


@pytest.fixture(scope="module")
def low(world) -> Made:
    """A LoRA trained with the CLIP loss, without an average."""
    clip = {"clip.model": str(world / "pipeline"), "clip.weight": 0.1}
    return make_run(world, "low", **clip, **{"student.mode": "lora", "ema": 0.0})


def convert(command: str, **values: object) -> None:
    """Calls a subcommand in this process: `convert(command, FLAG=value)`, a list for a flag given several times."""
    given = (
        (name, one)
        for name, value in values.items()
        for one in (value if isinstance(value, list) else [value])
    )
    cli.call_command([command, *(f"--{name}={one}" for name, one in given)], COMMANDS, "")


def same_tensors(ours: Path, theirs: Path) -> bool:
    return not listing.differences(listing.tensors(ours), listing.tensors(theirs))


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_to_diffusers_is_the_export_byte_for_byte(full, tmp_path):
    code, out, err = command("to-diffusers", f"--run={full.directory}", f"--out={tmp_path / 'full'}")
    assert code == 0, err
    assert out == f"wrote {tmp_path / 'full'} from step {STEP}\n"
    assert files_of(tmp_path / "full") == files_of(full.directory / "export")


def test_student_and_average_are_told_apart(full, tmp_path):
    for which, trained in (("student", full.state.student), ("ema", full.state.ema)):
        export_checkpoint(full.directory, tmp_path / which, which=which)
        got = load_component(tmp_path / which / "unet").params
        assert all(np.array_equal(got[name], trained[name]) for name in trained)


def test_the_teacher_is_the_pipeline_that_the_run_used(world, low, tmp_path, capsys):
    convert("to-diffusers", run=low.directory, which="teacher", out=tmp_path / "teacher")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'teacher'} from step {STEP}\n"
    assert same_tensors(tmp_path / "teacher", world / "pipeline")
    ours, theirs = (
        json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
        for directory in (tmp_path / "teacher", world / "pipeline")
    )
    assert ours == theirs and ours["_class_name"] == "DDIMScheduler"
    with pytest.raises(InputError, match="nowhere does not exist"):
        export_checkpoint(low.directory, tmp_path / "out", which="teacher", base="./nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_runs_are_merged_from_their_checkpoints_as_by_hand(world, full, low, tmp_path, lam):
    """The average of one run, the LoRA of the other on the teacher, the teacher's other parts."""
    runs = [str(full.directory), str(low.directory)]
    convert("merge", model=runs, weight=[lam, 1 - lam], out=tmp_path / "out")
    base = load_component(world / "pipeline" / "unet").params
    ours, theirs = full.state.ema, lora.merge(base, low.state.student, 8.0 / 4)
    got = load_component(tmp_path / "out" / "unet").params
    for name in base:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        want = {0.0: b, 1.0: a, 0.5: (a + b) / np.float32(2)}[lam]
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    others = {
        name: bytes for name, bytes in files_of(full.directory / "export").items() if "unet" not in name
    }
    merged = {name: bytes for name, bytes in files_of(tmp_path / "out").items() if "unet" not in name}
    assert merged == others and len(others) > 10


def test_a_run_of_another_shape_is_not_merged(full, tmp_path):
    unet = load_component(full.directory / "export" / "unet")
    config = dataclasses.replace(unet.config, cross_attention_dim=20)
    save_component(tmp_path / "wider", config, network(config).init(0))
    with pytest.raises(InputError, match=f"{tmp_path / 'wider'} does not match {full.directory}") as error:
        convert(
            "merge",
            model=[str(full.directory), str(tmp_path / "wider")],
            weight=[0.5, 0.5],
            out=tmp_path / "out",
        )
    wrong = [name for name in unet.params if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(wrong) > 2 and all(f"{name} has shape (20," in str(error.value) for name in wrong)
    assert not (tmp_path / "out").exists()


def test_a_run_is_also_what_a_lora_is_fused_into_or_extracted_from(world, full, low, tmp_path):
    file = tmp_path / "lora.safetensors"
    base = str(world / "pipeline")
    convert("extract-lora", model=[str(low.directory)], base=base, rank=4, out=file)
    convert("fuse", model=[base], lora=file, out=tmp_path / "fused")
    got = load_component(tmp_path / "fused" / "unet").params
    want = load_component(low.directory / "export" / "unet").params
    assert max(relative_error(got[name], want[name]) for name in want) < 1e-5
    convert("fuse", model=[str(full.directory)], lora=file, out=tmp_path / "both")
    assert not same_tensors(tmp_path / "both", full.directory / "export")


def test_a_teacher_that_moved_is_named_by_base(world, low, tmp_path):
    shutil.copytree(low.directory / "checkpoints", tmp_path / "run" / "checkpoints")
    shutil.copytree(world / "pipeline", tmp_path / "moved")
    hidden = (world / "pipeline").rename(world / "elsewhere")
    try:
        with pytest.raises(InputError, match="pipeline does not exist"):
            export_checkpoint(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        export_checkpoint(tmp_path / "run", tmp_path / "out", base=str(tmp_path / "moved"))
    finally:
        hidden.rename(world / "pipeline")
    assert files_of(tmp_path / "out") == files_of(low.directory / "export")


def test_a_start_that_moved_is_named_by_init(world, tmp_path):
    start = Path(shutil.copytree(world / "pipeline" / "unet", tmp_path / "start"))
    made = make_run(world, "from_elsewhere", **{"student.init": str(start)})
    start.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="start does not exist"):
        export_checkpoint(made.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    code, _, err = command(
        "to-diffusers",
        f"--run={made.directory}",
        f"--out={tmp_path / 'out'}",
        f"--init={tmp_path / 'moved'}",
    )
    assert code == 0, err
    assert files_of(tmp_path / "out") == files_of(made.directory / "export")


def test_what_was_trained_at_another_size_is_drawn_at_it(world, tmp_path):
    """A student of 48 px in the pipeline of a teacher that was made for 32: diffusers and we draw 48."""
    made = make_run(world, "larger", resolution=48)
    export_checkpoint(made.directory, tmp_path / "out")
    assert load_component(world / "pipeline" / "unet").config.sample_size == 8
    for export in (made.directory / "export", tmp_path / "out"):
        assert load_component(export / "unet").config.sample_size == 12
    assert sbv2_jax.load(tmp_path / "out").draw(["a red apple"]).shape == (1, 48, 48, 3)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    (picture,) = theirs("a red apple", num_inference_steps=1, guidance_scale=0).images
    assert picture.size == (48, 48)


def test_a_lora_is_the_averaged_one_where_the_run_keeps_an_average(world, tmp_path):
    made = make_run(world, "averaged", **{"student.mode": "lora"})
    for which, factors in ((None, made.state.ema), ("student", made.state.student)):
        file = tmp_path / f"{which}.safetensors"
        assert export_lora(made.directory, file, which=which) == STEP
        got = read_lora(file).factors
        assert all(np.array_equal(got[name], scaled(name, leaf, 2)) for name, leaf in factors.items())


def scaled(name: str, leaf: np.ndarray, scale: float) -> np.ndarray:
    """A factor as a file has it: alpha / rank is in those that go up."""
    return np.float32(scale) * leaf if ".up." in name else leaf


def test_the_students_lora_fused_is_the_export(world, low, tmp_path):
    file = tmp_path / "lora.safetensors"
    convert("lora", run=low.directory, out=file)
    update = read_lora(file)
    assert set(update.scales.values()) == {1.0}, "alpha / rank, 2, is in the factors"
    assert update.factors.keys() == low.state.student.keys()
    convert("fuse", model=[str(world / "pipeline")], lora=file, out=tmp_path / "fused")
    assert same_tensors(tmp_path / "fused", low.directory / "export")


def test_the_scores_lora_has_its_own_layers_rank_and_alpha(full, world, tmp_path, capsys):
    file = tmp_path / "score.safetensors"
    convert("lora", run=full.directory, which="score", out=file)
    assert capsys.readouterr().out == f"wrote {file} from step {STEP}\n"
    update = read_lora(file)
    for name, leaf in full.state.players["score"].params.items():
        np.testing.assert_array_equal(update.factors[name], scaled(name, leaf, 1.5))
    base = load_component(world / "pipeline" / "unet").params
    want = lora.merge(base, full.state.players["score"].params, 1.5)
    got = fuse(base, update)
    assert all(np.allclose(got[name], want[name], rtol=0, atol=1e-6) for name in want)
    layers = [name.removesuffix(".kernel") for name in base if name.endswith(".kernel")]
    convert("lora", run=full.directory, which="score", format="kohya", out=tmp_path / "kohya.safetensors")
    kohya = read_lora(tmp_path / "kohya.safetensors", layers=layers)
    assert kohya.scales == update.scales
    assert all(np.array_equal(kohya.factors[name], leaf) for name, leaf in update.factors.items())


def test_merge_and_extract_lora_reach_their_functions(world, full, tmp_path, capsys):
    trained, base = str(full.directory / "export" / "unet"), str(world / "pipeline" / "unet")
    convert("merge", model=[trained, base], weight=[0.25, 0.75], out=tmp_path / "merged")
    got, ours, theirs = (load_component(path).params for path in (tmp_path / "merged", trained, base))
    name = "conv_in.kernel"
    want = np.float32(0.25) * ours[name] + np.float32(0.75) * theirs[name]
    np.testing.assert_array_equal(got[name], want)
    convert("extract-lora", model=[trained], base=base, rank=2, out=tmp_path / "lora.safetensors")
    assert capsys.readouterr().out.startswith("rank 2 in ")
    written = read_lora(tmp_path / "lora.safetensors")
    assert set(written.scales.values()) == {1.0}
    assert {leaf.shape[-1] for name, leaf in written.factors.items() if ".down." in name} == {2}


def test_inspect_tells_every_tensor_and_every_difference(world, full, tmp_path, capsys):
    unet = world / "pipeline" / "unet"
    convert("inspect", model=[str(unet)])
    out = capsys.readouterr().out
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    want = [
        f"{name} F32 {list(array.shape)} {array.nbytes} {hashlib.sha256(array.tobytes()).hexdigest()}"
        for name, array in sorted(tensors.items())
    ]
    total = sum(array.nbytes for array in tensors.values())
    assert out.splitlines() == [*want, f"{len(tensors)} tensors, {total} bytes"]

    count = len(listing.tensors(world / "pipeline"))
    *lines, last = listing.report(world / "pipeline", full.directory / "export")
    assert lines == [f"unet.{name}: other values" for name in sorted(tensors)]
    assert last == f"{len(tensors)} of {count} tensors differ"

    shutil.copytree(unet, tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 2}))  # not compared
    assert list(listing.report(unet, tmp_path / "unet")) == [f"0 of {len(tensors)} tensors differ"]


def test_a_pipeline_goes_to_orbax_and_back(world, tmp_path):
    convert("from-diffusers", model=[str(world / "pipeline")], out=tmp_path / "orbax")
    assert (tmp_path / "orbax" / "unet" / "orbax" / "manifest.json").is_file()
    convert("to-diffusers", model=[str(tmp_path / "orbax")], out=tmp_path / "back")
    assert same_tensors(tmp_path / "back", world / "pipeline")
    assert same_tensors(tmp_path / "orbax", world / "pipeline")


def test_differences_of_names_shapes_and_types(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    same, empty = np.arange(6, dtype=np.int64), np.zeros((0, 3), np.float32)
    save_file({"same": same, "empty": empty, "x": np.ones(2, np.float32), "mine": np.ones(1)}, a)
    save_file({"same": same, "empty": empty, "x": np.ones((2, 1), np.float16), "yours": np.ones(1)}, b)
    assert list(listing.report(a, b)) == [
        "mine: only in the first",
        "x: F32 (2,) and F16 (2, 1)",
        "yours: only in the second",
        "3 of 5 tensors differ",
    ]
    assert listing.tensors(a)["same"].sha256 == hashlib.sha256(same.tobytes()).hexdigest()
    assert listing.tensors(a)["empty"].nbytes == 0


REFUSED = {
    "no command": ((), "one command is expected: to-diffusers, from-diffusers, from-openclip"),
    "misspelt command": (("to-difusers",), "did you mean to-diffusers?"),
    "missing flags": (("fuse", "--model={}/pipeline"), "fuse needs --lora, --out"),
    "stray flag": (("inspect", "--model={}/pipeline", "--rank=2"), "inspect does not take --rank"),
    "stray flag of a form": (
        ("to-diffusers", "--model={}/pipeline", "--out={}/x", "--step=3"),
        "to-diffusers --model does not take --step",
    ),
    "no such choice": (("lora", "--run={}/low", "--out={}/x", "--which=tacher"), "--which=tacher"),
    "unknown flag": (("fuse", "--modl={}/pipeline"), "unknown flag --modl; did you mean --model?"),
    "an argument too many": (("inspect", "--model={}/pipeline", "more"), "unexpected argument 'more'"),
    "no value": (("inspect", "--model"), "--model needs a value"),
    "an empty value": (("inspect", "--model="), "--model=: must be a string that is not empty"),
    "not a number": (
        ("lora", "--run={}/low", "--out={}/x", "--step=1.5"),
        "--step=1.5: must be a whole number",
    ),
    "out of range": (
        ("extract-lora", "--model={}/x", "--base={}/x", "--rank=0", "--out={}/x"),
        "--rank=0: must be a whole number >= 1",
    ),
    "twice": (("fuse", "--out=a", "--out=b"), "--out is given twice; it takes one value"),
    "no repository": (("to-diffusers", "--run={}/x", "--out={}/x", "--push_to_hub=a"), "a is not OWNER/NAME"),
    "no such run": (("to-diffusers", "--run={}/none", "--out={}/x"), "no checkpoint in"),
}


def test_the_command_refuses_with_one_line_and_exit_code_2(world):
    with ThreadPoolExecutor(4) as pool:
        calls = [[part.format(world) for part in arguments] for arguments, _ in REFUSED.values()]
        results = list(pool.map(lambda arguments: command(*arguments), calls))
    for (code, out, err), (case, (_, message)) in zip(results, REFUSED.items(), strict=True):
        assert code == 2 and not out, (case, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, (case, err)
    assert not (world / "x").exists()


def test_each_command_has_its_own_help():
    """None of them waits for jax, and each tells its own flags only."""
    with ThreadPoolExecutor(4) as pool:
        results = dict(zip(COMMANDS, pool.map(lambda name: command(name, "--help"), COMMANDS), strict=True))
    every = {flag.name for one in COMMANDS.values() for flag in one.flags}
    for name, (code, out, err) in results.items():
        told = set(re.findall(r"^  --(\w+) ", out, re.MULTILINE)) - {"version"}
        assert (code, err) == (0, "") and told == {flag.name for flag in COMMANDS[name].flags} < every
        assert out.startswith(f"usage: convert.py {name} ") and COMMANDS[name].call.__doc__ in out
    code, out, err = command("--help")
    assert (code, err) == (0, "") and all(f"\n  {name} " in out for name in COMMANDS)


def test_the_home_directory_in_every_path(world, low, tmp_path, monkeypatch, capsys):
    """As the shell leaves it in --flag=~/..., of which it makes nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, target in (("low", low.directory), ("pipeline", world / "pipeline")):
        (tmp_path / name).symlink_to(target)
    convert("lora", run="~/low", out="~/lora.safetensors")
    convert("fuse", model="~/pipeline", lora="~/lora.safetensors", out="~/fused")
    convert("merge", model=["~/low", "~/fused"], weight=[0.5, 0.5], out="~/merged")
    convert("extract-lora", model="~/fused", base="~/pipeline", rank=1, out="~/small.safetensors")
    convert("to-diffusers", run="~/low", base="~/pipeline", init="~/pipeline", out="~/export")
    capsys.readouterr()
    convert("inspect", model="~/export", other="~/fused")
    assert capsys.readouterr().out.startswith("0 of ")
    written = {"lora.safetensors", "fused", "merged", "small.safetensors", "export"}
    assert written < {path.name for path in tmp_path.iterdir()} and not Path("~").exists()


def test_what_a_run_cannot_give_is_refused_and_nothing_is_written(full, low, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--model is given twice; it takes one value"):
        convert("inspect", model=["a", "b"])
    with pytest.raises(InputError, match="trains all weights of its student"):
        export_lora(full.directory, out)
    with pytest.raises(InputError, match=r"holds no leaf ema\.\*"):
        export_checkpoint(low.directory, out, which="ema")
    with pytest.raises(InputError, match="--which=teacher is no LoRA"):
        export_lora(low.directory, out, which="teacher")
    with pytest.raises(InputError, match="--which=score is no student"):
        export_checkpoint(low.directory, out, which="score")
    with pytest.raises(InputError, match="no checkpoint of step 9 .* stored: 4"):
        export_checkpoint(low.directory, out, step=9)
    with Checkpoints(tmp_path / "other" / "checkpoints", keep=1, config={"steps": 2}) as checkpoints:
        checkpoints.save(1, {"student": {"x": np.ones(2, np.float32)}, "step": np.int32(1)})
    with pytest.raises(InputError, match="not of a distillation: its config lacks teacher"):
        export_checkpoint(tmp_path / "other", out)
    assert not out.exists()
    (out / "sub").mkdir(parents=True)
    with pytest.raises(InputError, match="is not empty; nothing was written"):
        export_checkpoint(low.directory, out)


def test_a_damaged_step_is_refused_and_without_a_step_passed_over(full, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(full.directory / "checkpoints", run / "checkpoints")
    path = run / "checkpoints" / str(STEP) / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=f"{STEP} cannot be used"):
        export_checkpoint(run, tmp_path / "out", step=STEP)
    assert export_checkpoint(run, tmp_path / "out") == STEP - 1
    assert not any(leaf.any() for leaf in load_component(tmp_path / "out" / "unet").params.values())
