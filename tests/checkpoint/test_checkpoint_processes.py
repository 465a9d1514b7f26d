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


PROCESSES = """
import pathlib, sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
def place(x):
    x = np.asarray(x)
    sharding = NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else P())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
with t.opened(pathlib.Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, jax.tree.map(place, t.state_at(1)))
    checkpoints.save(2, jax.tree.map(place, t.state_at(2)))
    checkpoints.wait()
    victim = pathlib.Path(sys.argv[1]) / "2" / "manifest.json"
    if sys.argv[3] == "0":
        victim.write_text("{")
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("damaged")
    step, state, _ = checkpoints.restore(t.abstract(jax.tree.map(place, t.state_at(0))))
    assert step == 1, step
    whole = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), state)
    t.assert_same_bits(whole, t.state_at(1))
"""


def test_two_processes_save_and_restore_one_state(tmp_path):
    port = free_port()
    processes = [start(PROCESSES, tmp_path, port, number, devices=2) for number in range(2)]
    for process in processes:
        finish(process)
    with opened(tmp_path) as checkpoints:
        found, got, _ = checkpoints.restore(abstract(state_at(0)))
    assert found == 1
    assert_same_bits(got, state_at(1))
    assert json.loads((tmp_path / "1" / "manifest.json").read_text())["body"]["step"] == 1
