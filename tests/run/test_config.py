"""The strict configuration: a wrong field is an InputError that names it, before any device is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sbv2_jax import fields
from sbv2_jax.convert.formats.resolve import is_hub_id
from sbv2_jax.errors import InputError
from sbv2_jax.openmoji.pretrain import settings
from sbv2_jax.run.config import FIELDS, FORMER, check_mesh, default_config, may_change, validate

ROOT = Path(__file__).parents[2]
# All but the one of launch/pretrain.py.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("[!_]*.py") if path.stem != "openmoji_teacher")


def with_field(name: str, value) -> ConfigDict:
    config = default_config()
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    return config


def test_the_default_is_valid_and_of_the_declared_fields():
    config = default_config()
    validate(config)
    assert sorted(fields.field_names(config)) == sorted(FIELDS) and config.is_locked and config.vsd.is_locked


@pytest.mark.parametrize("declared", [FIELDS, settings.FIELDS], ids=["run", "pretraining"])
def test_every_field_says_what_it_may_be_and_what_it_does_in_one_line(declared):
    for name, field in declared.items():
        assert field.check(field.default) is None, name
        assert field.expected and field.help.endswith(".") and "\n" not in field.help, name


def test_the_page_of_the_configuration_is_up_to_date(tmp_path):
    written = tmp_path / "configuration.md"
    command = [sys.executable, "benchmarks/configuration_page.py", f"--write={written}"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == written.read_text(), f"run {' '.join(command[1:2])} --write={page}"


def test_the_default_holds_the_published_values():
    config = default_config()
    assert (config.student.lr, config.score.lr, config.optimizer.clip_norm) == (1e-6, 1e-3, 1.0)
    assert (config.score.rank, config.score.alpha) == (64, 128)
    assert (config.student.lora.rank, config.student.lora.alpha) == (256, 512)
    assert (config.vsd.guidance, config.vsd.score_guidance) == (4.5, 4.5)
    assert (config.vsd.t_min, config.vsd.t_max, config.clip.tau) == (20, 980, 0.35)
    assert config.score.null_prompt_probability == 0.1
    assert (config.steps, config.batch_size, config.ema) == (48_000, 64, 0.9999)


@pytest.mark.parametrize("name", ["tpu_v4", "tpu_v5e", "tpu_v6e", "gpu"])
@pytest.mark.parametrize("argument", ["", ":lora"])
def test_the_runs_of_stable_diffusion_keep_the_published_batch_and_rates(name, argument):
    config = fields.load(f"{ROOT}/configs/{name}.py{argument}")
    assert (config.steps, config.batch_size, config.ema) == (48_000, 64, 0.9999)
    assert (config.student.lr, config.score.lr, config.score.alpha) == (1e-6, 1e-3, 128)
    assert config.clip.model == ("./checkpoints/openclip-vit-b-32" if argument else "")
    published = default_config().to_dict()
    for group in ("vsd", "score", "optimizer"):
        assert config[group].to_dict() == published[group]


def test_the_targets_choose_attention_projections_and_nothing_else():
    attention = "down_blocks.0.attentions.1.transformer_blocks.0.attn1."
    config = default_config()
    for name in ("to_q", "to_v"):
        assert re.fullmatch(config.score.targets, attention + name)
    for name in ("to_k", "to_out.0", "to_q.kernel"):
        assert not re.fullmatch(config.score.targets, attention + name)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        assert re.fullmatch(config.student.lora.targets, attention + name)
    assert not re.fullmatch(config.student.lora.targets, "mid_block.attentions.0.proj_in")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_valid_whole_and_shrunk(path):
    docstring = path.read_text().split('"""')[1]
    for argument in ("", "runlocal"):
        spec = f"{path}:{argument}" if argument else str(path)
        config = fields.load(spec)
        validate(config)
        assert config.is_locked
        assert f"--config=configs/{path.name}{':' if argument else ''}{argument}" in docstring
    assert (config.teacher, config.prompts) == ("bundled", "openmoji") and config.steps <= 10
    assert check_mesh(config, 1) == (1, 1, 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_start_is_of_the_teacher_and_of_pairs_alone(path):
    for argument in ("regression", "regression,runlocal", "lora,regression"):
        config = fields.load(f"{path}:{argument}")
        validate(config)
        assert (config.terms, config.pairs.share, config.student.init) == (("regression",), 1.0, "teacher")
        assert config.pairs.path and not (config.clip.model or config.reward.model)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_first_version_is_vsd_alone_from_the_teacher_s_weights(path):
    for argument in ("v1", "v1,runlocal", "lora,v1"):
        config = fields.load(f"{path}:{argument}")
        validate(config)
        assert (config.terms, config.student.init, config.student.mode) == (("vsd",), "teacher", "full")
        assert (config.vsd.weighting, config.optimizer.weight_decay) == ("sbv2", 0)
        assert config.ema and not (config.clip.model or config.reward.model)
    if path.stem != "openmoji":
        config = fields.load(f"{path}:v1")
        assert (config.steps, config.batch_size, config.score.alpha) == (16_000, 64, 108)
        assert (config.student.lr, config.score.lr, config.vsd.guidance) == (1e-6, 1e-3, 4.5)


def test_the_second_training_has_lora_and_clip():
    for name in ("tpu_v4", "gpu"):
        config = fields.load(f"{ROOT}/configs/{name}.py:lora")
        validate(config)
        assert config.student.mode == "lora" and config.clip.weight == 0.1 and config.clip.model


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_model_of_a_config_file_is_asked_of_the_hub(path):
    """Who has not put a checkpoint where the file expects it is told so, and is not given a stranger's."""
    config = fields.load(f"{path}:lora")
    names = (config.teacher, config.student.init, config.clip.model, config.clip.decoder)
    assert all(names) and not any(map(is_hub_id, names))


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, True),
        ({"optimizer.schedule": "cosine"}, False),
        ({"clip.weight": 0.1}, False),
        ({"clip.weight": 0.1, "clip.schedule": "constant"}, True),
        ({"clip.weight": 0.1, "clip.schedule": "constant", "reward.weight": 0.1}, False),
    ],
)
def test_the_number_of_steps_may_change_where_nothing_falls_towards_the_last(changes, free):
    config = default_config()
    config.update_from_flattened_dict(changes)
    assert ("steps" in may_change(config)) == free
    assert "mesh" in may_change(config) and "student.lr" not in may_change(config)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 0, "a whole number >= 1, not 0"),
        ("steps", 1.5, "a whole number >= 1"),
        ("steps", True, "a whole number >= 1, not True"),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("student.lr", "1e-6", "a finite number > 0, not '1e-6'"),
        ("student.lr", float("nan"), "a finite number > 0, not nan"),
        ("score.lr", float("inf"), "a finite number"),
        ("student.mode", "lorra", "one of 'full', 'lora', not 'lorra'"),
        ("student.lora.targets", "(", "a regular expression (missing )"),
        ("score.null_prompt_probability", 1.5, "a finite number >= 0 and <= 1"),
        ("vsd.weighting", "DMD", "one of 'sbv2', 'dmd'"),
        ("score.weighting", "x0", "one of 'epsilon', 'v', 'native', not 'x0'"),
        ("vsd.t_max", 1000, "a whole number from 1 to 999"),
        ("clip.tau", 2, "a finite number >= -1 and <= 1"),
        ("ema", 1.0, "a finite number >= 0 and < 1"),
        ("teacher", " ", "a string that is not empty"),
        ("mesh.data", 0, "a whole number >= 1, or -1"),
        ("mesh.data", -2, "a whole number >= 1, or -1"),
        ("precision", "float16", "one of 'float32', 'bfloat16'"),
        ("sample.prompts", "a cat", "a tuple of strings that are not empty, not 'a cat'"),
        ("sample.prompts", ("a cat", ""), "a tuple of strings"),
        ("checkpoint.keep", 0, "a whole number >= 1"),
    ],
)
def test_a_wrong_type_or_range_names_the_field(name, value, says):
    with pytest.raises(InputError, match=re.escape(f"config.{name} must be {says}")):
        validate(with_field(name, value))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vsd.t_min": 980}, "config.vsd.t_min = 980 must be below config.vsd.t_max = 980"),
        ({"clip.weight": 0.1}, "config.clip.weight = 0.1 needs a config.clip.model"),
        ({"reward.weight": 0.1}, "config.reward.weight = 0.1 needs a config.reward.model"),
        (
            {"reward.weight": 0.1, "reward.model": "x"},
            "config.reward.weight = 0.1 needs 'reward' in config.terms",
        ),
        ({"vsd.weight": 0.0}, "config.vsd.weight and config.clip.weight are 0: nothing"),
        ({"pairs.path": "pairs"}, "config.pairs.path = 'pairs' needs 'regression' in config.terms"),
        ({"gan.path": "real"}, "config.gan.path = 'real' needs 'gan' in config.terms"),
        ({"terms": ("vsd", "gan")}, "'gan', which needs a config.gan.path: launch/latents.py"),
        ({"terms": ("vsd", "regression")}, "'regression', which needs a config.pairs.path: launch/pairs.py"),
        (
            {"terms": ("regression",), "pairs.path": "pairs", "pairs.weight": 0.0},
            "config.pairs.weight are 0: nothing trains the student",
        ),
        ({"pairs.share": 0.0}, "config.pairs.share must be a finite number > 0 and <= 1"),
        ({"steps": 5, "optimizer.warmup": 5}, "config.optimizer.warmup = 5 must be below config.steps = 5"),
        ({"sample.prompts": ()}, "config.sample.every = 500 needs config.sample.prompts"),
        ({"accumulate": 3}, "config.batch_size = 64 is not a multiple of config.accumulate"),
        ({"mesh.data": 3}, "config.batch_size = 64 is not a multiple"),
        ({"mesh.fsdp": 5}, "config.batch_size = 64 is not a multiple"),
    ],
)
def test_a_conflict_names_the_fields(changes, says):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=re.escape(says)):
        validate(config)


def test_unknown_and_missing_fields():
    config = default_config()
    with config.unlocked():
        config.studnet = ConfigDict({"lr": 1.0})
    with pytest.raises(
        InputError, match=r"unknown field config.studnet.lr; did you mean config.student.lr\?"
    ):
        validate(config)
    config = default_config()
    with config.unlocked():
        del config.vsd.t_min
    with pytest.raises(InputError, match="config.vsd.t_min is missing"):
        validate(config)


def test_the_mesh_is_checked_against_the_devices():
    config = default_config()
    assert check_mesh(config, 1) == (1, 1, 1)
    assert check_mesh(config, 8) == (1, 8, 1)
    config.mesh.fsdp = 4
    assert check_mesh(config, 8) == (1, 2, 4)
    with pytest.raises(InputError, match="config.mesh.fsdp = 1 x 4 does not divide the 6 devices"):
        check_mesh(config, 6)
    config.mesh.data = 4
    with pytest.raises(InputError, match="1 x 4 x 4 needs 16 devices; there are 8"):
        check_mesh(config, 8)
    config.mesh.update(replica=2, data=-1)
    assert check_mesh(config, 8) == (2, 1, 4)
    config.mesh.update(replica=1, fsdp=1)
    config.batch_size = 12
    validate(config)
    with pytest.raises(InputError, match="config.batch_size = 12 is not a multiple of .* = 1 x 8"):
        check_mesh(config, 8)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def get_config(): return {}", "must return a ConfigDict"),
        ("x = 1", "AttributeError"),
    ],
)
def test_a_config_file_that_does_not_load(tmp_path, source, says):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(InputError, match=f"config file {re.escape(str(path))}: .*{says}|{says}"):
        fields.load(str(path))


def test_a_missing_file_and_an_unknown_argument(tmp_path):
    with pytest.raises(InputError, match="no config file 'nowhere.py'"):
        fields.load("nowhere.py")
    with pytest.raises(InputError, match="no config file"):
        fields.load(str(tmp_path))
    with pytest.raises(InputError, match="unknown config argument 'runlocl'; did you mean runlocal"):
        fields.load(f"{ROOT}/configs/openmoji.py:runlocl")


def test_jax_is_not_imported():
    script = "import sbv2_jax.run.config, sbv2_jax.cli, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("value", [3, 0.0, (0.5, 4.0), [1.0, 2.0]])
def test_a_guidance_is_a_number_or_a_range(value):
    config = default_config()
    config.vsd.guidance = value
    validate(config)


@pytest.mark.parametrize("value", [(4.0, 0.5), (1.0,), (1.0, 2.0, 3.0), (-1.0, 2.0), "4.5", True, (2.0, 2.0)])
def test_a_guidance_that_is_neither_is_refused(value):
    config = default_config()
    config.vsd.guidance = value
    with pytest.raises(InputError, match=r"config.vsd.guidance must be a finite number >= 0, or two of them"):
        validate(config)


def test_what_a_run_did_before_there_was_a_field_is_known():
    """A default that changes would change what such a checkpoint was trained with."""
    assert FORMER == {
        "clip.schedule": "linear",
        "gan.lr": 1e-4,
        "gan.path": "",
        "gan.share": 0.5,
        "gan.weight": 1e-3,
        "pairs.path": "",
        "pairs.share": 0.05,
        "pairs.weight": 0.25,
        "prompts_column": "",
        "reward.model": "",
        "reward.schedule": "linear",
        "reward.tau": 0.3,
        "reward.weight": 0.0,
        "score.weighting": "epsilon",
        "student.timesteps": [],
        "terms": ["vsd", "clip"],
    }
