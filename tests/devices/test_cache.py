"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from sbv2_jax.devices.cache import use_cache

pytestmark = pytest.mark.slow


@pytest.fixture
def directory():
    """Has JAX know no directory; returns a function that asks for the one it knows after `use_cache`."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)

    def chosen(*arguments: Path) -> Path:
        use_cache(*arguments)
        return Path(jax.config.jax_compilation_cache_dir)

    yield chosen
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(directory, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert directory() == Path.home() / ".cache" / "sbv2_jax"


def test_the_users_cache_may_lie_elsewhere(directory, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory() == tmp_path / "sbv2_jax"


def test_a_run_may_name_a_place(directory, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert directory(tmp_path / "run") == tmp_path / "run"


def test_what_jax_was_told_stays(directory, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert directory() == directory(tmp_path / "run") == tmp_path / "own"
