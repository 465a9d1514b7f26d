"""Settings of every test: the CPU, silent-broadcast errors, and the comparison that all parity tests use."""

import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do: what one of them, or a process it starts, has compiled serves the next.
_CACHE = tempfile.TemporaryDirectory(prefix="sbv2_jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
# The small programs too: together they take longer than the large ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Small networks run in no time, however badly they are compiled; compiling them well takes twice as long.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"  # the parts are for threads, of which there are none to spare
)

# The README's command has a worker for each core, and many a test starts processes: threads would only wait in turn.
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from bare_package import stand_in

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 20, 50)  # tracing makes objects by the million, few of them in circles
stand_in("torch_fidelity")  # else torchmetrics cannot be imported beside it


def relative_error(ours, theirs) -> float:
    """Returns max |ours - theirs| / max |theirs|, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.abs(theirs).max() > 0, "a comparison with zeros proves nothing"
    return measured(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))


_FIGURES: dict[str, float] = {}


def measured(error: float) -> float:
    """Notes an error for the table of `pytest --figures`, the largest of each test, and returns it."""
    test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
    _FIGURES[test] = max(float(error), _FIGURES.get(test, 0.0))
    return error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="print the largest error that each test measured")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: sent to the process that prints
        session.config.workeroutput["figures"] = _FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--figures"):
        terminalreporter.section("largest relative errors")
        for test, error in sorted(_FIGURES.items()):
            terminalreporter.write_line(f"{error:.1e}  {test.removeprefix('tests/')}")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Lets go of what a file has compiled: kept to the end, it is several GiB for each worker."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
