"""A term of the objective from a user's own file: trained with over eight devices, saved, resumed and exported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documented import block
from ml_collections import ConfigDict
from tiny_pipeline import write_world

from sbv2_jax.distill.terms.term import Source, needed_sources, term_classes
from sbv2_jax.errors import InputError

TESTS = Path(__file__).parents[1]
COLOUR = block("docs/extending.md", "a term")


@pytest.mark.slow
def test_a_term_outside_the_package_trains_saves_resumes_and_exports(tmp_path):
    write_world(tmp_path)
    prompts = [
        f"a {colour} {thing}" for colour in ("red", "pink", "blue") for thing in ("dog", "apple", "cat")
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    own = tmp_path / "colour.py"
    own.write_text(COLOUR)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, TESTS / "own_term_run.py"],
        input=json.dumps({"world": str(tmp_path), "term": f"{own}:Colour"}),
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["steps"] == [4, 4]
    assert found["same"], "interrupted or not, the same state to the bit"
    lines = found["lines"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert not any(line["skipped"] for line in lines)
    assert lines[0]["loss/vsd"] == 0 < lines[1]["loss/vsd"], "at first the score model is the teacher"
    assert lines[-1]["loss/colour"] < 0.95 * lines[0]["loss/colour"], "the student follows the term"
    assert -1.5 < lines[0]["colour/red"] < 1.5
    assert len(found["picture"]) == 4


def config_of(*terms: str) -> ConfigDict:
    return ConfigDict({"terms": terms, "clip": {"model": "a", "decoder": "b"}})


REFUSED = {
    "vsdd": "'vsdd' is none of vsd, clip.*did you mean vsd",
    "missing.py:Colour": "missing.py:Colour: FileNotFoundError: no file missing.py",
    "no_such_package.terms:Colour": "ModuleNotFoundError",
    "{}:Pink": "AttributeError",
    "{}:VALUE": "is no term: derive it from",
    "{}:Nameless": "is no term: derive it from",
    "{}:Broken": "has two terms of the name 'clip'",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_is_no_term_is_refused(tmp_path, spec):
    own = tmp_path / "own.py"
    own.write_text(
        "from sbv2_jax.distill.terms.term import Term\nVALUE = 3\nclass Nameless(Term): pass\n"
        "class Broken(Term): name = 'clip'\n"
    )
    with pytest.raises(InputError, match=REFUSED[spec]):
        term_classes(config_of("vsd", "clip", spec.format(own)))


def test_terms_share_a_frozen_network_of_one_name_and_place_alone(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from sbv2_jax.distill.terms.term import Source, Term\n"
        "class Own(Term):\n    name = 'own'\n    @classmethod\n"
        "    def sources(cls, config): return {'decoder': Source(config.clip.decoder, 'vae_tiny', 'own')}\n"
        "class Other(Own):\n    name = 'other'\n    @classmethod\n"
        "    def sources(cls, config): return {'decoder': Source('c', 'vae_tiny', 'own')}\n"
    )
    config = config_of("clip", f"{own}:Own")
    assert needed_sources(config, term_classes(config))["decoder"] == Source(
        "b", "vae_tiny", "config.clip.decoder"
    )
    config = config_of("clip", f"{own}:Other")
    with pytest.raises(InputError, match="'other' needs another frozen network 'decoder'.*: 'c' and 'b'"):
        needed_sources(config, term_classes(config))
