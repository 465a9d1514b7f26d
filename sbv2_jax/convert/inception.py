"""The published weights of FID's Inception, a file of torch.save, to a directory that this package loads."""

import hashlib
from pathlib import Path

from sbv2_jax.convert.formats.component import write_component
from sbv2_jax.convert.formats.files import file_of, new_directory
from sbv2_jax.convert.formats.names import params_from_torch
from sbv2_jax.convert.formats.torch_files import read_torch_file
from sbv2_jax.errors import InputError
from sbv2_jax.models.inception import InceptionConfig
from sbv2_jax.models.registry import network


def convert(model: str | Path, out: str | Path) -> None:
    """Writes an InceptionV3 as `config.json` and `model.safetensors`, in float32.

    `model` is `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid publishes, and torch-fidelity under another
    name, or a file of the same tensors; nothing of its pickle is run. The SHA-256 of the file goes into config.json:
    by it the published weights are known. Raises InputError for a file that is missing or holds other tensors;
    nothing is written then.
    """
    path = Path(model).expanduser()
    path = file_of(path.parent, path.name)
    tensors = {
        name: array
        for name, array in read_torch_file(path).items()
        if not name.endswith(".num_batches_tracked")
    }
    if wrong := [name for name, array in tensors.items() if array.dtype != "float32"]:
        raise InputError(f"{path}: {wrong[0]} is {tensors[wrong[0]].dtype}, float32 is expected")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    classes = len(tensors["fc.bias"]) if "fc.bias" in tensors else InceptionConfig.num_classes
    config = InceptionConfig(num_classes=classes, converted_from=digest)
    params = params_from_torch(tensors, network(config).shapes, str(path))
    with new_directory(out) as partial:
        write_component(partial, config, params)
