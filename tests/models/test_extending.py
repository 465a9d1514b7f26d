"""docs/extending.md: the metric and the network are used as they stand there (the term: distill/test_own_term.py)."""

import ast

import numpy as np
import pytest
import torch
from documented import block
from drawn_prompts import differences_of, intervals_of
from safetensors.numpy import save_file

from sbv2_jax.convert.formats.component import load_component, save_component
from sbv2_jax.errors import InputError
from sbv2_jax.models import registry
from sbv2_jax.tree import require_same


def names_of(name: str) -> dict:
    space: dict = {"__name__": "extension"}
    exec(compile(block("docs/extending.md", name), "docs/extending.md", "exec", dont_inherit=True), space)
    return space


def test_a_metric_is_a_class_and_a_line(rng):
    space = names_of("a metric")
    line = block("docs/extending.md", "a metric's line").strip().removeprefix("+").strip()
    (added,) = eval(compile(ast.parse(f"({line})", mode="eval"), "line", "eval"), space)
    fake = rng.standard_normal((500, 7)) * 3 + 100
    columns = {"fake": fake, "prompts": np.repeat(np.arange(100), 5), "real": fake[:9]}
    found = intervals_of(added, columns, resamples=100)[added.name]
    assert found.value == pytest.approx(np.cov(fake.T, ddof=0).trace(), rel=1e-10)
    assert found.low < found.value < found.high < 1.2 * found.value
    assert added.measure(fake=np.ones((9, 4))) == {"spread": 0}
    wider = differences_of(added, columns | {"fake": 1.5 * fake}, columns, resamples=100)["spread"]
    assert wider.value == pytest.approx(1.25 * found.value) and wider.low > 0


def test_a_network_is_a_file_and_a_line(tmp_path, monkeypatch, rng):
    space = names_of("a network")
    line = block("docs/extending.md", "a line").strip().removeprefix("+").strip()
    added = eval(compile(ast.parse(f"{{{line}}}", mode="eval"), "line", "eval"), space)
    monkeypatch.setattr(registry, "_CLASSES", registry._CLASSES | added)
    head = torch.nn.Linear(768, 1)
    tensors = {f"head.{name}": leaf.detach().numpy() for name, leaf in head.named_parameters()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "AestheticHead", "features": 768}')
    found = load_component(tmp_path)
    features = rng.standard_normal((3, 768), np.float32)
    ours = registry.network(found.config).apply(found.params, features)
    np.testing.assert_allclose(ours, head(torch.from_numpy(features)).detach(), rtol=1e-4, atol=1e-5)

    save_component(tmp_path / "again", found.config, found.params)
    require_same(load_component(tmp_path / "again").params, found.params, "again", "first")
    (tmp_path / "config.json").write_text('{"_class_name": "AestheticHead", "features": 9}')
    with pytest.raises(InputError, match="head.weight has shape"):
        load_component(tmp_path)
