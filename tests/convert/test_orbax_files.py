"""Models with their weights in Orbax: from diffusers and back byte for byte, used as they are, verified."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from conftest import relative_error
from diffusers import StableDiffusionPipeline as TorchPipeline
from forked_commands import forks
from safetensors.numpy import load_file
from their_models import TYPES, their_model
from tiny_pipeline import write_pipeline
from train_processes import ended, free_port
from transformers import CLIPModel as TorchCLIP

import sbv2_jax
from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert import inspection as listing
from sbv2_jax.convert.formats.component import check_component, load_component, write_component
from sbv2_jax.convert.formats.orbax_files import write_params
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.convert.lora.extract import extract_file
from sbv2_jax.convert.lora.fuse import fuse_file
from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.convert.merge import merge_models
from sbv2_jax.convert.model import open_model
from sbv2_jax.devices.sharding import make_mesh, shardings
from sbv2_jax.errors import InputError
from sbv2_jax.run.arrays import load_frozen
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config

pytestmark = pytest.mark.slow

NETWORKS = ("unet", "vae", "text_encoder", "vae_tiny", "clip")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`pipeline` as diffusers wrote it, `orbax`, and `back` from there."""
    directory = tmp_path_factory.mktemp("world")
    rewrite(write_pipeline(directory), directory / "orbax", orbax=True)
    rewrite(directory / "orbax", directory / "back", orbax=False)
    return directory


def test_a_pipeline_comes_back_byte_for_byte(world):
    assert not list((world / "orbax").rglob("*.safetensors")) and not list((world / "back").rglob("orbax"))
    count = 0
    for name in NETWORKS:
        (theirs,), (back,) = ((world / one / name).glob("*.safetensors") for one in ("pipeline", "back"))
        want, got = load_file(theirs), load_file(back)
        if name == "text_encoder":  # transformers 5 leaves this out, and reads both
            want = {f"text_model.{tensor}": array for tensor, array in want.items()}
        assert got.keys() == want.keys()
        for tensor in want:
            assert got[tensor].dtype == want[tensor].dtype and got[tensor].shape == want[tensor].shape
            assert got[tensor].tobytes() == want[tensor].tobytes()
            count += 1
    for other in ("pipeline", "back"):
        assert list(listing.report(world / "orbax", world / other)) == [f"0 of {count} tensors differ"]
    for path in (world / "pipeline" / "tokenizer").iterdir():
        assert (world / "back" / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (load_pipeline(world / one) for one in ("back", "pipeline"))
    assert (ours.configs, ours.scheduler) == (theirs.configs, theirs.scheduler)
    pipe = TorchPipeline.from_pretrained(world / "back")
    want = TorchPipeline.from_pretrained(world / "pipeline")
    for name, tensor in want.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "CLIPModel"])
def test_a_network_on_its_own_is_read_by_orbax_itself(tmp_path, name, dtype):
    their_model(name).to(dtype).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text("{}")
    rewrite(tmp_path / "theirs", tmp_path / "orbax", orbax=True)
    want = load_component(tmp_path / "theirs").params
    plain = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "orbax" / "state")
    read = load_component(tmp_path / "orbax").params
    for got in (plain, read):
        assert got.keys() == want.keys()
        for leaf in want:
            array = np.asarray(got[leaf])
            assert (array.dtype, array.shape) == (TYPES[dtype], want[leaf].shape)
            assert array.tobytes() == want[leaf].tobytes()
    half = load_component(tmp_path / "orbax", dtype="bfloat16").params
    assert all(half[leaf].tobytes() == want[leaf].astype("bfloat16").tobytes() for leaf in want)
    rewrite(tmp_path / "orbax", tmp_path / "back", orbax=False)
    assert not listing.differences(listing.tensors(tmp_path / "back"), listing.tensors(tmp_path / "theirs"))
    assert (tmp_path / "back" / "preprocessor_config.json").read_text() == "{}"
    if name == "CLIPModel":
        TorchCLIP.from_pretrained(tmp_path / "back")


def test_the_library_loads_the_same_weights(world):
    ours, theirs = (sbv2_jax.load(world / one) for one in ("orbax", "pipeline"))
    assert ours.generator.unet is theirs.generator.unet, "one network, as the configurations are equal"
    leaves = list(zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True))
    assert len(leaves) > 150 and all(np.array_equal(a, b) for a, b in leaves)


def test_a_run_starts_from_it_with_the_same_weights(world):
    def frozen_of(teacher: Path):
        config = default_config()
        config.teacher = str(teacher)
        config.clip.update(model=str(teacher), weight=0.1)
        config.student.update(mode="lora", init=str(teacher / "unet"))
        run = assemble(config, read_parts(config))
        ids = np.zeros(run.parts.text_encoder.config.max_position_embeddings, np.int32)
        return load_frozen(run, ids, shardings(run.frozen_shapes, make_mesh(1, 1, 1)))

    ours, theirs = frozen_of(world / "orbax"), frozen_of(world / "pipeline")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    leaves = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert len(leaves) > 200 and all(np.array_equal(a, b) for a, b in leaves)


def test_it_is_merged_fused_and_extracted_from_like_the_other(world, tmp_path, rng):
    kernel = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = load_component(world / "pipeline" / "unet").params[f"{kernel}.kernel"].shape[0]
    factors = {
        f"{kernel}.lora.down.kernel": rng.standard_normal((width, 2), np.float32),
        f"{kernel}.lora.up.kernel": rng.standard_normal((2, width), np.float32),
    }
    save_lora(tmp_path / "lora.safetensors", factors, 3.0)
    for one in ("orbax", "pipeline"):
        fuse_file(open_model(world / one), tmp_path / "lora.safetensors", tmp_path / f"fused-{one}")
    fused, theirs = (listing.tensors(tmp_path / f"fused-{one}") for one in ("orbax", "pipeline"))
    assert not listing.differences(fused, theirs)
    changed = listing.differences(fused, listing.tensors(world / "orbax"))
    assert changed == [f"unet.{kernel}.weight: other values"]
    models = [open_model(one) for one in (tmp_path / "fused-orbax", world / "orbax")]
    merge_models(models, [0.5, 0.5], tmp_path / "merged")
    extracted = extract_file(open_model(tmp_path / "merged"), models[1], 2, tmp_path / "half.safetensors")
    want = factors[f"{kernel}.lora.down.kernel"] @ factors[f"{kernel}.lora.up.kernel"] * (3.0 / 2 / 2)
    got = extracted.factors[f"{kernel}.lora.down.kernel"] @ extracted.factors[f"{kernel}.lora.up.kernel"]
    assert relative_error(got, want) < 1e-5 and not extracted.left_out


@pytest.fixture
def unet(world, tmp_path) -> Path:
    """A UNet that a test may spoil."""
    part = load_component(world / "pipeline" / "unet")
    (tmp_path / "unet").mkdir()
    write_component(tmp_path / "unet", part.config, part.params, orbax=True)
    return tmp_path / "unet"


def refused(directory: Path, message: str, *, by_its_manifest: bool = True) -> str:
    """Both readers refuse the directory, or the one that reads the arrays; nothing is written."""
    out = directory.parent / "out"
    for read in (check_component, load_component, lambda path: rewrite(path, out, orbax=False)):
        if read is check_component and not by_its_manifest:
            read(directory)
            continue
        with pytest.raises(InputError, match=message) as error:
            read(directory)
        assert "\n" not in str(error.value) and not out.exists()
    return str(error.value)


def test_every_array_that_does_not_fit_is_listed(world, tmp_path):
    part = load_component(world / "pipeline" / "unet")
    wrong = dict(part.params)
    del wrong["conv_in.kernel"]
    wrong["conv_out.bias"] = wrong["conv_out.bias"].astype(np.float64)
    wrong["conv_out.kernel"] = wrong["conv_out.kernel"].transpose(3, 2, 0, 1)
    wrong["ema.decay"] = np.zeros(3, np.float32)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((world / "orbax" / "unet" / "config.json").read_text())
    write_params(tmp_path / "unet", wrong)
    message = refused(tmp_path / "unet", "does not fit its config.json in 4 arrays")
    for line in (
        "missing conv_in.kernel (3, 3, 4, 8)",
        "conv_out.kernel has shape (4, 8, 3, 3), expected (3, 3, 8, 4)",
        "conv_out.bias has type float64, expected one of float32, bfloat16, float16",
        "unexpected ema.decay (3,)",
    ):
        assert line in message


def test_a_flipped_byte_is_found_and_its_arrays_are_named(unet):
    """Orbax would give back wrong numbers, or an error of its decoder."""
    largest = max((unet / "orbax" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    refused(unet, "damaged|unreadable", by_its_manifest=False)


def test_an_array_that_orbax_lost_is_named(unet):
    path = unet / "orbax" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes().replace(b"conv_in.bias", b"conv_in.biar"))
    refused(unet, "is damaged: conv_in.bias does not match", by_its_manifest=False)


def test_an_array_that_is_not_what_was_written_is_named(unet):
    path = unet / "orbax" / "manifest.json"
    body = json.loads(path.read_text())["body"]
    body["leaves"]["conv_in.bias"]["sha256"] = "0" * 64
    resealed(body)(unet)
    refused(unet, "is damaged: conv_in.bias does not match its SHA-256$", by_its_manifest=False)


def truncate(unet: Path) -> None:
    path = max((unet / "orbax" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def no_manifest(unet: Path) -> None:
    (unet / "orbax" / "manifest.json").unlink()


def both(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"")


def link(unet: Path) -> None:
    (unet / "orbax").rename(unet.parent / "elsewhere")
    (unet / "orbax").symlink_to(unet.parent / "elsewhere")


def link_within(unet: Path) -> None:
    path = next(path for path in (unet / "orbax" / "state").rglob("*") if path.is_file())
    path.rename(unet.parent / "elsewhere")
    path.symlink_to(unet.parent / "elsewhere")


def edit(unet: Path) -> None:
    path = unet / "orbax" / "manifest.json"
    sealed = json.loads(path.read_text())
    sealed["body"]["leaves"]["conv_in.bias"]["sha256"] = "0" * 64
    path.write_text(json.dumps(sealed))


def resealed(body: object):
    """A manifest that is sealed and says something else."""

    def spoil(unet: Path) -> None:
        sealed = {"format": 1, "sha256": json_digest(body), "body": body}
        (unet / "orbax" / "manifest.json").write_text(json.dumps(sealed))

    return spoil


MANIFEST = {"step": 0, "config": {}, "config_sha256": "", "fingerprint": "", "extra": {}, "versions": {}}
WRONG_MANIFESTS = [
    3,
    {},
    {"step": 0},
    MANIFEST | {"files": {}, "leaves": {"x": 3}},
    MANIFEST | {"files": {}, "leaves": []},
]


@pytest.mark.parametrize("body", WRONG_MANIFESTS, ids=lambda body: str(body)[-25:])
def test_a_manifest_that_is_none_is_refused(unet, body):
    resealed(body)(unet)
    refused(unet, "cannot be used: its manifest is not one")


REFUSED = {
    truncate: r"cannot be used: .* bytes instead of",
    no_manifest: "cannot be used: no manifest.json",
    both: "has weights twice: orbax/ and diffusion_pytorch_model.safetensors",
    link: "holds symbolic links: orbax",
    link_within: "holds symbolic links",
    edit: "cannot be used: manifest.json does not match its own digest",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_not_what_was_written_is_refused_before_an_array_is_read(unet, spoil):
    spoil(unet)
    refused(unet, REFUSED[spoil])


PROGRAM = """
import sys, jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), initialization_timeout=60)
from sbv2_jax.convert.lora.extract import extract_file
from sbv2_jax.convert.lora.fuse import fuse_file
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.convert.merge import merge_models
if jax.process_index() == 0:
    rewrite(sys.argv[3], sys.argv[4], orbax=False)
    rewrite(sys.argv[4], sys.argv[4] + "-orbax", orbax=True)
"""


def test_one_process_of_two_reads_and_writes_without_the_other(world, tmp_path):
    """As at the end of a run on several hosts, where the first one exports."""
    address = f"localhost:{free_port()}"
    arguments = [str(world / "orbax"), str(tmp_path / "out")]
    processes = [forks().start(["-c", PROGRAM, address, str(number), *arguments]) for number in range(2)]
    for code, error in ended(processes):
        assert code == 0, error
    for out in ("out", "out-orbax"):
        assert listing.tensors(tmp_path / out) == listing.tensors(world / "pipeline")
