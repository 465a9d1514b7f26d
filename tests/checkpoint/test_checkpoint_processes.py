"""Checkpoints of other owners, full disks, killed processes, other meshes, and several processes."""

import json
import os
import random
import signal
import time

import jax
import jax.numpy as jnp
import pytest
from made_checkpoints import abstract, assert_same_bits, finish, opened, start, state_at
from train_processes import free_port

from sbv2_jax.checkpoint import CheckpointError
from sbv2_jax.errors import InputError


def test_a_second_process_on_the_directory_is_refused(tmp_path):
    script = """
import pathlib, sys
from sbv2_jax.errors import InputError
try:
    t.opened(pathlib.Path(sys.argv[1]))
except InputError as error:
    print(error)
"""
    with opened(tmp_path):
        assert f"is in use by process {os.getpid()} on" in finish(start(script, tmp_path))
    with opened(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write checkpoints to"):
        opened(tmp_path / "file")
    with pytest.raises(InputError, match="mounted file system"):
        opened("gs://bucket/run")
    (tmp_path / "sealed").mkdir(mode=0o555)
    script = """
import os, pathlib, sys
from sbv2_jax.errors import InputError
if os.getuid() == 0:
    os.setuid(65534)  # the superuser may write anywhere
try:
    t.opened(pathlib.Path(sys.argv[1]))
except InputError as error:
    print(error)
"""
    assert "cannot write checkpoints" in finish(start(script, tmp_path / "sealed"))


def test_an_error_of_the_writer_surfaces_at_the_next_save_and_at_close(tmp_path):
    script = """
import pathlib, resource, sys
from sbv2_jax.checkpoint import CheckpointError
checkpoints = t.opened(pathlib.Path(sys.argv[1]))
checkpoints.save(1, t.state_at(1))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))  # every write beyond this fails, as on a full disk
checkpoints.save(2, t.state_at(2))
for call in (lambda: checkpoints.save(3, t.state_at(3)), checkpoints.close):
    try:
        call()
    except CheckpointError as error:
        print("raised:", error)
"""
    out = finish(start(script, tmp_path))
    assert out.count("raised: a checkpoint could not be written") == 2
    with opened(tmp_path) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 1
    assert_same_bits(got, state_at(1))


def test_a_save_that_fails_at_once_is_one_line(tmp_path):
    with opened(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="step 1 is not saved: .*zero size"):
            checkpoints.save(1, {"empty": jnp.zeros((0, 3))})
        checkpoints.save(2, state_at(2))
        assert checkpoints.restore(abstract(state_at(0)))[0] == 2


KILLED = """
import pathlib, sys
with t.opened(pathlib.Path(sys.argv[1]), keep=2) as checkpoints:
    restored = checkpoints.restore(t.abstract(t.state_at(0)))
    step = 0
    if restored:
        step, state, extra = restored
        t.assert_same_bits(state, t.state_at(step))
        assert extra == {"position": step * 64}
    while True:
        step += 1
        checkpoints.save(step, t.state_at(step), {"position": step * 64})
        if restored is not True:
            checkpoints.wait()
            print("at", step, flush=True)
            restored = True
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves_resumes_from_a_verified_step(tmp_path):
    generator = random.Random(0)
    reached = []
    for _ in range(4):
        process = start(KILLED, tmp_path)
        line = process.stdout.readline()
        if not line.startswith("at "):
            pytest.fail(process.communicate()[1][-3000:])
        reached.append(int(line.split()[1]))
        time.sleep(generator.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with opened(tmp_path) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
        assert not any((tmp_path / ".partial").iterdir())
    assert_same_bits(got, state_at(found))
    assert reached == sorted(set(reached)) and found >= reached[-1]


# Other meshes and several processes

MESHES = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
def spec(x):
    shape = P(*[None] * (len(x.shape) - 1), "fsdp") if len(x.shape) > 1 else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, shape))
target = jax.tree.map(spec, t.state_at(0))
with t.opened(pathlib.Path(sys.argv[1])) as checkpoints:
    step, state, _ = checkpoints.restore(target)
    jax.tree.map(lambda x, want: (np.testing.assert_equal(x.sharding, want.sharding)), state, target)
    assert len(state.student["conv_in.kernel"].sharding.device_set) == 8
    assert state.student["conv_in.kernel"].addressable_shards[0].data.shape == (3, 3, 4, 32)
    t.assert_same_bits(state, t.state_at(step))
    placed = jax.tree.map(lambda x, want: jax.device_put(x, want.sharding), t.state_at(3), target)
    checkpoints.save(3, placed)
"""


def test_restores_onto_eight_devices_and_back_onto_one(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.save(2, state_at(2))
    finish(start(MESHES, tmp_path, devices=8))
    with opened(tmp_path) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 3
    assert_same_bits(got, state_at(3))
    # The digest is of the whole array, whatever its sharding.
    assert jax.tree.leaves(got)[0].sharding.num_devices == 1


PARTS = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sbv2_jax.checkpoint.manifest import digest
from sbv2_jax.checkpoint.parts import check, describe_own, joined, same
from sbv2_jax.checkpoint.snapshot import snapshot
mesh = jax.make_mesh((2, 2, 2), ("replica", "data", "fsdp"), axis_types=(AxisType.Auto,) * 3)
specs = [P(), P("fsdp"), P(None, "fsdp"), P(("data", "fsdp")), P("fsdp", ("replica", "data")), P("data", None, "fsdp")]
rng = np.random.default_rng()
bits = rng.integers(0, 2**16, (16, 8, 264), np.uint16)
bits[(bits & 0x7F80) == 0x7F80] = 7  # no NaN among them
hosts = {"large": rng.standard_normal((64, 48, 8), np.float32), "half": bits.view(jnp.bfloat16)}
placed = lambda spec: {name: jax.device_put(host, NamedSharding(mesh, spec)) for name, host in hosts.items()}
for spec in specs:
    arrays = placed(spec)
    copies = snapshot(arrays)
    for name, copy in copies.items():
        assert copy.sharding.memory_kind == "pinned_host" and len(copy.addressable_shards) == 8
        assert sum(shard.data.nbytes for shard in copy.addressable_shards) == hosts[name].nbytes, "held twice"
        # Each device's part is one that it has anyway.
        for mine, theirs in zip(copy.addressable_shards, arrays[name].addressable_shards, strict=True):
            outer = zip(mine.index, theirs.index, copy.shape, strict=True)
            assert all(set(range(n)[a]) <= set(range(n)[b]) for a, b, n in outer)
    stored, not_finite = joined([describe_own(copies, primary=True)])
    assert not not_finite
    for name, entry in stored.items():
        blocks = [np.split(np.arange(n), count) for n, count in zip(hosts[name].shape, entry["parts"], strict=True)]
        want = [digest(hosts[name][np.ix_(*block)]) for block in itertools.product(*blocks)]
        assert entry["sha256"] == want and len(want) == 8, name
    whole = {name: {**entry, "sha256": digest(hosts[name])} for name, entry in stored.items()}
    for entry in whole.values():
        del entry["parts"]
    for other in specs:
        again = placed(other)
        for manifest in (stored, whole):
            assert check(manifest, again) == ([], [])
            for name in hosts:
                flipped = hosts[name].copy()
                flipped.view(np.uint8).reshape(-1)[rng.integers(flipped.nbytes)] ^= 1 << rng.integers(8)
                changed = again | {name: jax.device_put(flipped, again[name].sharding)}
                assert check(manifest, changed) == ([name], [])
                assert same(hosts[name], again[name]) and not same(hosts[name], changed[name])
hosts["large"][3, 40, 5] = -np.inf
assert describe_own(snapshot(placed(specs[4])), primary=True).not_finite == ["large"]
"""


def test_parts_are_compared_whatever_devices_they_were_on_and_are_on(tmp_path):
    finish(start(PARTS, devices=8))


PROCESSES = """
import json, pathlib, sys, threading
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sbv2_jax.checkpoint import CheckpointError
gather, own = multihost_utils.process_allgather, int(sys.argv[3])
def small(x, **settings):
    assert all(leaf.nbytes <= 1000 for leaf in jax.tree.leaves(x)), "an array is gathered"
    return gather(x, **settings)
multihost_utils.process_allgather = small
meet = multihost_utils.sync_global_devices
def not_beside_a_step(name):
    assert threading.current_thread() is threading.main_thread(), "the devices may be within a step"
    meet(name)
multihost_utils.sync_global_devices = not_beside_a_step
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
def place(x):
    x = np.asarray(x)
    sharding = NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else P())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
directory = pathlib.Path(sys.argv[1])
with t.opened(directory) as checkpoints:
    # Saved by one process, with one digest for an array of which each process has a part.
    target = t.abstract(jax.tree.map(place, t.state_at(0)))
    step, state, _ = checkpoints.restore(target)
    t.assert_same_bits(jax.tree.map(lambda x: gather(x, tiled=True), state), t.state_at(1))
    checkpoints.save(2, state)
    checkpoints.save(3, jax.tree.map(place, t.state_at(3)))
    checkpoints.wait()
    bad = t.state_at(4)
    bad.student["conv_in.kernel"] = bad.student["conv_in.kernel"].at[0, 0, 0, -1].set(np.nan)  # of process 1
    checkpoints.save(4, jax.tree.map(place, bad))
    try:
        checkpoints.wait()
        raise AssertionError("NaN was saved")
    except ValueError as error:
        assert "step 4 is not saved: NaN or Inf in 1 leaves: student.conv_in.kernel" in str(error), error
    multihost_utils.sync_global_devices("refused")
    assert not (directory / "4").exists() and not list((directory / ".partial").iterdir())
    # A part of process 1 is not what its digest says: both fall back.
    manifest = directory / "3" / "manifest.json"
    if own == 0:
        from sbv2_jax.checkpoint.manifest import json_digest
        sealed = json.loads(manifest.read_text())
        sealed["body"]["leaves"]["student.conv_in.kernel"]["sha256"][3] = 64 * "0"
        manifest.write_text(json.dumps(sealed | {"sha256": json_digest(sealed["body"])}))
    multihost_utils.sync_global_devices("damaged")
    step, state, _ = checkpoints.restore(target)
    assert step == 2, step
    t.assert_same_bits(jax.tree.map(lambda x: gather(x, tiled=True), state), t.state_at(1))
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_one_state(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
    port = free_port()
    processes = [start(PROCESSES, tmp_path, port, number, devices=2) for number in range(2)]
    for process in processes:
        finish(process)
    with opened(tmp_path) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 2
    assert_same_bits(got, state_at(1))
    body = json.loads((tmp_path / "2" / "manifest.json").read_text())["body"]
    assert body["step"] == 2
    kernel, bias = (
        body["leaves"][f"student.{name}"] for name in ("conv_in.kernel", "down_blocks.0.attn1.to_q.bias")
    )
    assert kernel["parts"] == [1, 1, 1, 4] and len(set(kernel["sha256"])) == 4
    assert "parts" not in bias and len(bias["sha256"]) == 64
