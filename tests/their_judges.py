"""Networks of packages that import torchvision, which cannot be imported beside the pinned torch, without it.

They are installed without what they ask for: `pip install --no-deps -r tests/judges.txt`.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
from bare_package import stand_in

from sbv2_jax.convert.formats.published_shapes import torch_shapes
from sbv2_jax.models.inception import InceptionConfig
from sbv2_jax.models.registry import network


def random_inception(file: Path, seed: int = 0, **options) -> torch.nn.Module:
    """torch-fidelity's Inception for features and logits of uint8 [N, 3, H, W], with the weights that are in `file`.

    They are written there before, drawn so that every tensor matters; `options` are those of `torch.save`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in torch_shapes(network(InceptionConfig()).shapes).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise * (2 / noise[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            weights[name] = 0.2 * noise
    torch.save(weights, file, **options)
    theirs = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return theirs("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))


def fidelity(name: str) -> types.ModuleType:
    """A file of torch-fidelity."""
    return _file("torch_fidelity", name)


def cleanfid(name: str) -> types.ModuleType:
    """A file of clean-fid."""
    return _file("cleanfid", name)


def openclip(name: str) -> types.ModuleType:
    """A file of open_clip; of torchvision it gets the name of a layer that no vision transformer has."""
    # transformers asks whether there is a torchvision: before one seems to be
    from transformers import AutoModel  # noqa: F401

    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    stubs = {one: types.ModuleType(one) for one in names}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    sys.modules.update(stubs)
    try:
        return _file("open_clip", name)
    finally:
        for one in stubs:
            del sys.modules[one]


def _file(package: str, name: str) -> types.ModuleType:
    stand_in(package)
    if package not in sys.modules:
        raise ModuleNotFoundError(f"{package} is missing: pip install --no-deps -r tests/judges.txt")
    return importlib.import_module(f"{package}.{name}")
