"""Checkpoints that are healthy, damaged, or of another run: verified values or a clear error."""

import gc
import json
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from made_checkpoints import CONFIG, State, abstract, assert_same_bits, contents, files_of, opened, state_at
from orbax.checkpoint._src.multihost import multihost

from sbv2_jax.checkpoint import CheckpointError, load
from sbv2_jax.checkpoint.files import file_sizes, step_numbers
from sbv2_jax.checkpoint.manifest import changed_leaves, describe, json_digest
from sbv2_jax.errors import InputError
from sbv2_jax.tree import leaf_names

# A read that Orbax gives up on leaves coroutines behind; they are of no interest here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with the steps 1 and 2, to be copied before it is damaged."""
    directory = tmp_path_factory.mktemp("two_steps")
    with opened(directory) as checkpoints:
        checkpoints.save(1, state_at(1), {"position": 64})
        checkpoints.save(2, state_at(2), {"position": 128})
    return directory


@pytest.fixture
def stored(two_steps, tmp_path):
    yield Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))
    gc.collect()  # so that what Orbax left behind is reported, and ignored, here


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings that were logged."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: lines.append(message % values))
    return lines


# --- what a healthy directory does


@pytest.mark.parametrize("asynchronous", [True, False])
def test_roundtrip_is_bit_identical_though_the_state_is_donated_at_once(tmp_path, asynchronous):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0)
    want = jax.tree.map(np.array, state_at(5))
    with opened(tmp_path, asynchronous=asynchronous) as checkpoints:
        state = state_at(5)
        checkpoints.save(5, state, {"position": 320})
        for _ in range(3):
            state = step(state)
        found, got, extra = checkpoints.restore(abstract(state))
    assert (found, extra) == (5, {"position": 320})
    assert isinstance(got, State)
    assert_same_bits(got, want)


def test_an_empty_directory_restores_nothing(tmp_path):
    with opened(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract(state_at(0))) is None


def test_the_newest_steps_are_kept_and_foreign_directories_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30, 40):
            checkpoints.save(step, state_at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".partial", "30", "40", "notes"]
    assert not any((tmp_path / ".partial").iterdir())


def test_an_explicit_step_and_load_of_a_part(stored):
    with opened(stored) as checkpoints:
        found, got, extra = checkpoints.restore(abstract(state_at(1)), step=1)
        assert (found, extra) == (1, {"position": 64})
        assert_same_bits(got, state_at(1))
        # load takes no lock: it reads a run that is training.
        found, leaves, manifest = load(stored, prefix="student.")
    assert found == 2 and manifest.config["student"]["lr"] == 1e-6
    assert_same_bits(leaves, {name: np.asarray(leaf) for name, leaf in state_at(2).student.items()})
    with pytest.raises(InputError, match="holds no leaf ema.*student, student_opt"):
        load(stored, prefix="ema.")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7 .*stored: 1, 2"):
        load(stored, step=7)


def test_plain_orbax_reads_what_we_write(stored):
    with ocp.CheckpointManager(stored) as manager:
        assert manager.all_steps() == [1, 2]
        state = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    np.testing.assert_array_equal(
        state["student.conv_in.kernel"], state_at(2).student["conv_in.kernel"], strict=True
    )


def test_a_stored_step_is_never_saved_again(stored):
    before = contents(stored)
    with opened(stored) as checkpoints:
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=f"step {step} is not saved: .* already has step 2"):
                checkpoints.save(step, state_at(3))
    assert contents(stored) == before


# --- damage


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_never_gives_wrong_values(stored, two_steps):
    refused = 0
    for path in files_of(stored / "2"):
        size = path.stat().st_size
        for position in sorted({0, size // 3, size // 2, size - 1}):
            data = bytearray(path.read_bytes())
            data[position] ^= 1 << (position % 8)
            path.write_bytes(data)
            with opened(stored) as checkpoints:
                found, got, _ = checkpoints.restore(abstract(state_at(0)))
                # Orbax leaves bytes in its files that nothing refers to; a flip there is no damage.
                assert_same_bits(got, state_at(found))
                if found == 1:
                    # Which of the checks sees it first, Orbax's, the size's or the digest's, is the file's matter.
                    with pytest.raises(CheckpointError, match=re.escape(str(stored / "2"))):
                        checkpoints.restore(abstract(state_at(0)), step=2)
                    refused += 1
            shutil.copy(two_steps / path.relative_to(stored), path)
    assert refused >= 4, "hardly a flip reached anything that matters"


@pytest.mark.parametrize("damage", ["truncate", "empty", "zero", "delete"])
def test_a_damaged_file_falls_back_or_changes_nothing(stored, two_steps, damage):
    for path in files_of(stored / "2"):
        size = path.stat().st_size
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(
                {"truncate": path.read_bytes()[: size // 2], "empty": b"", "zero": bytes(size)}[damage]
            )
        with opened(stored) as checkpoints:
            found, got, _ = checkpoints.restore(abstract(state_at(0)))
        assert_same_bits(got, state_at(found))
        if damage != "zero":
            assert found == 1, path
        shutil.copy(two_steps / path.relative_to(stored), path)


def test_no_process_waits_for_another_before_all_know_what_was_read(stored, monkeypatch):
    """One that cannot read its shards comes to no barrier within the reading."""
    waited = []
    with opened(stored) as checkpoints:
        monkeypatch.setattr(multihost, "sync_global_processes", lambda name, **_: waited.append(name))
        checkpoints.restore(abstract(state_at(0)))
        assert waited == []
        monkeypatch.undo()


def test_a_leaf_that_orbax_lost_is_damage(stored):
    """One bit in the metadata renames a leaf, and Orbax gives back no array for the old name, and no error."""
    path = stored / "2" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes().replace(b"student.conv_in.kernel", b"student.conv_in.kernem"))
    with pytest.raises(CheckpointError, match="2 cannot be used: .*student.conv_in.kernel"):
        load(stored, 2, "student.")
    step, leaves, _ = load(stored, None, "student.")
    assert step == 1 and leaves["conv_in.kernel"].shape == (3, 3, 4, 64)
    with opened(stored) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 1
    assert_same_bits(got, state_at(1))


def test_higher_steps_that_are_no_checkpoints_are_skipped_with_a_warning(stored, warnings):
    (stored / "9").mkdir()
    (stored / "8").mkdir()
    shutil.copy(stored / "2" / "_CHECKPOINT_METADATA", stored / "8")
    shutil.copytree(stored / "2", stored / "7")
    (stored / "6.orbax-checkpoint-tmp").mkdir()
    with opened(stored) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
        assert found == 2
        assert_same_bits(got, state_at(2))
        assert len(warnings) == 3
        assert all(
            re.search(f"skipped checkpoint .*/{step}: ", line)
            for step, line in zip("987", warnings, strict=True)
        )
        assert "no manifest.json" in warnings[0] and "is of step 2" in warnings[2]
        # The run goes on from 2 and takes the place of what was damaged.
        checkpoints.save(9, state_at(9))
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 9
    assert_same_bits(got, state_at(9))


def test_a_damaged_step_is_replaced_and_never_counted_by_retention(stored):
    target = max(files_of(stored / "2" / "state"), key=lambda path: path.stat().st_size)
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    with opened(stored, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(state_at(0)))[0] == 1
        checkpoints.save(2, state_at(2))
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 2 and not (stored / "1").exists()
    assert_same_bits(got, state_at(2))


def test_all_steps_damaged_is_an_error_and_nothing_is_overwritten(stored):
    (stored / "1" / "manifest.json").unlink()
    (stored / "2" / "manifest.json").write_text("{")
    before = contents(stored)
    with opened(stored) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(state_at(0)))
    assert "step 2: manifest.json is unreadable" in str(error.value)
    assert "step 1: no manifest.json" in str(error.value)
    assert contents(stored) == before


def test_another_format_is_an_error_not_damage(stored):
    path = stored / "2" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with opened(stored) as checkpoints, pytest.raises(InputError, match="has format 2; this version reads"):
        checkpoints.restore(abstract(state_at(0)))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_step_of_before_is_verified_as_it_was(tmp_path, damaged):
    """Compressed, by Orbax's own handler, with one digest an array and nothing of parts or sources."""
    leaves = dict(zip(leaf_names(state_at(5)), jax.tree.leaves(state_at(5)), strict=True))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(tmp_path / "5", args=ocp.args.Composite(state=ocp.args.StandardSave(leaves)))
    described = describe({name: np.asarray(leaf) for name, leaf in leaves.items()})
    if damaged:
        described["student.conv_in.kernel"]["sha256"] = 64 * "1"
    body = {
        "step": 5,
        "config": CONFIG,
        "config_sha256": json_digest(CONFIG),
        "fingerprint": "abc",
        "extra": {"n": 1},
    }
    body |= {"leaves": described, "files": file_sizes(tmp_path / "5"), "versions": {}}
    sealed = {"format": 1, "sha256": json_digest(body), "body": body}
    (tmp_path / "5" / "manifest.json").write_text(json.dumps(sealed))
    with opened(tmp_path) as checkpoints:
        if damaged:
            with pytest.raises(CheckpointError, match="student.conv_in.kernel does not match its SHA-256"):
                checkpoints.restore(abstract(state_at(0)))
            return
        found, got, extra = checkpoints.restore(abstract(state_at(0)))
        assert (found, extra) == (5, {"n": 1})
        assert_same_bits(got, state_at(5))
        checkpoints.save(6, state_at(6))
    assert step_numbers(tmp_path) == [5, 6]


# --- what does not fit


def test_every_unlike_leaf_is_listed_in_one_error(stored):
    state = state_at(0)
    student = dict(state.student)
    del student["conv_in.kernel"]
    student["extra.bias"] = jnp.zeros(3)
    student["down_blocks.0.attn1.to_q.kernel"] = jnp.zeros((64, 32))
    student["down_blocks.0.attn1.to_q.bias"] = jnp.zeros(64)
    with opened(stored) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(abstract(state._replace(student=student)))
    for line in (
        "in 4 leaves",
        "student.extra.bias is not in the checkpoint",
        "student.conv_in.kernel is in the checkpoint only",
        "to_q.kernel is float32[64, 64] in the checkpoint, float32[64, 32] expected",
        "to_q.bias is bfloat16[64] in the checkpoint, float32[64] expected",
    ):
        assert line in str(error.value)


def test_a_field_that_is_newer_than_the_checkpoint_stands_for_what_was_done_before(stored):
    student = {**CONFIG["student"], "mode": "full"}
    with opened(
        stored, config={**CONFIG, "student": student}, former={"student.mode": "full"}
    ) as checkpoints:
        assert checkpoints.restore(abstract(state_at(0))) is not None
    other = {**CONFIG, "student": {**student, "mode": "lora"}}
    checkpoints = opened(stored, config=other, former={"student.mode": "full"})
    with checkpoints, pytest.raises(InputError, match="student.mode was 'full', is 'lora'"):
        checkpoints.restore(abstract(state_at(0)))


def test_another_configuration_is_refused_field_by_field_unless_forced(stored):
    other = {"steps": 99, "student": {"lr": 2e-6, "targets": ["q", "v"], "mode": "full"}, "prompts": "p.txt"}
    checkpoints = opened(stored, config=other, may_change=("steps",), fingerprint="xyz")
    with checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(abstract(state_at(0)))
    assert "student.lr was 1e-06, is 2e-06; student.mode was absent, is 'full'" in str(error.value)
    assert "the prompt data was 'abc', is 'xyz'" in str(error.value)
    assert "steps" not in str(error.value) and "targets" not in str(error.value)
    with opened(stored, config=other, fingerprint="xyz", force=True) as checkpoints:
        assert checkpoints.restore(abstract(state_at(0)))[0] == 2
    with opened(stored, config=other, may_change=("steps", "student"), fingerprint="abc") as checkpoints:
        assert checkpoints.restore(abstract(state_at(0)))[0] == 2


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_and_leave_the_directory_as_it_was(stored, value, asynchronous):
    state = state_at(3)
    state.student["down_blocks.0.attn1.to_q.bias"] = (
        state.student["down_blocks.0.attn1.to_q.bias"].at[7].set(value)
    )
    before = contents(stored)
    with opened(stored, asynchronous=asynchronous) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"^step 3 is not saved: NaN or Inf in 1 leaves: student\..*q.bias"
        ):
            checkpoints.save(3, state)
            checkpoints.wait()
        assert step_numbers(stored) == [1, 2] and not any((stored / ".partial").iterdir())
        checkpoints.save(4, state_at(4))
    assert step_numbers(stored) == [1, 2, 4]
    assert {name: data for name, data in contents(stored).items() if name in before} == before


@pytest.mark.parametrize("way", ["save", "check", "close"])
def test_nan_and_inf_are_told_by_whatever_is_asked_next(stored, way):
    """The save itself returns before they are looked for; none of the ways out forgets them."""
    state = state_at(3)
    state.student["conv_in.kernel"] = state.student["conv_in.kernel"].at[2, 1, 3, 5].set(np.nan)
    checkpoints = opened(stored)
    checkpoints.save(3, state)
    with checkpoints, pytest.raises(CheckpointError, match="step 3 is not saved: NaN or Inf"):  # noqa: PT012
        if way == "save":
            checkpoints.save(4, state_at(4))
        elif way == "check":
            while True:
                checkpoints.check()
                time.sleep(0.01)
        checkpoints.close()
    assert step_numbers(stored) == [1, 2]


def test_extra_that_json_cannot_hold_fails_at_once(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, state_at(1), {"key": object()})


def test_the_digest_names_the_leaf_in_which_one_bit_differs():
    array = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    flipped = array.copy()
    flipped.view(np.uint32)[2, 1] ^= 1
    changed = changed_leaves(describe({"a": array, "b": array}), describe({"a": array, "b": flipped}))
    assert changed == ["b does not match its SHA-256"]
