"""Ten thousand spoilt LoRA files: each is read or refused with one line, and nothing else happens."""

import itertools
import json
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sbv2_jax.convert.lora.files import read_loras
from sbv2_jax.convert.lora.fuse import fuse
from sbv2_jax.errors import InputError

FILES = 10_000
WIDTH = 8
LAYERS = {
    "unet": ["mid_block.attentions.0.to_q", "mid_block.attentions.0.to_out.0", "mid_block.resnets.0.conv1"],
    "text_encoder": ["text_model.encoder.layers.0.mlp.fc1"],
}
BASE = {
    part: {
        f"{layer}.kernel": np.ones((3, 3, WIDTH, WIDTH) if "conv" in layer else (WIDTH, WIDTH), np.float32)
        for layer in layers
    }
    for part, layers in LAYERS.items()
}
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "",
    None,
    7,
]
WORDS = [
    "lora_A.weight", "lora_B.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a",
    "lokr_w2", "lokr_t2", "diff", "lora_B.bias", "weight", "lora_magnitude_vector", "a" * 400, "é", "", ".",
    "embeddings.position_ids.alpha", "text_encoder.x.lora_A.weight", "to_q_lora.down.weight",
    "lora_unet_mid_block_resnets_0_conv1.hada_t1",
]  # fmt: skip
VALUES = [
    None,
    True,
    0,
    -1,
    4.0,
    1e400,
    10**400,
    "4",
    [],
    ["to_q"],
    {},
    {"to_q": 2},
    {"(a+)+": 1},
    {"[": 1},
    {"a{9999999999}": 1},
]
SETTINGS = [
    "unet.r", "unet.lora_alpha", "unet.alpha", "unet.rank_pattern", "unet.alpha_pattern", "unet.peft_type",
    "unet.use_dora", "unet.use_rslora", "unet.target_modules", "unet.bias", "unet.init_lora_weights",
    "text_encoder.r", "r", "unet", ".",
]  # fmt: skip

Header = dict[str, dict]


def originals(directory: Path, rng: np.random.Generator) -> list[bytes]:
    """A sound file of each kind."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    first, out, conv = LAYERS["unet"]
    text = "text_encoder." + LAYERS["text_encoder"][0]
    flat = "lora_unet_" + first.replace(".", "_")
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q", "to_out.0", "conv1"]}
    plain = {
        f"unet.{first}.lora_A.weight": draw(2, WIDTH), f"unet.{first}.lora_B.weight": draw(WIDTH, 2),
        f"unet.{out}.lora_A.weight": draw(2, WIDTH), f"unet.{out}.lora_B.weight": draw(WIDTH, 2),
        f"unet.{conv}.lora_A.weight": draw(2, WIDTH, 3, 3), f"unet.{conv}.lora_B.weight": draw(WIDTH, 2, 1, 1),
        f"{text}.lora_A.weight": draw(3, WIDTH), f"{text}.lora_B.weight": draw(WIDTH, 3),
    }  # fmt: skip
    kohya = {
        f"{flat}.lora_down.weight": draw(2, WIDTH), f"{flat}.lora_up.weight": draw(WIDTH, 2),
        f"{flat}.alpha": np.array(3, np.int64), f"{flat}.dora_scale": draw(WIDTH, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": draw(2, WIDTH, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": draw(2, 2, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": draw(WIDTH, 2, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.alpha": np.array([3], np.float16),
    }  # fmt: skip
    lycoris = {
        f"{flat}.hada_w1_a": draw(WIDTH, 2), f"{flat}.hada_w1_b": draw(2, WIDTH),
        f"{flat}.hada_w2_a": draw(WIDTH, 2), f"{flat}.hada_w2_b": draw(2, WIDTH),
        "lora_unet_mid_block_attentions_0_to_out_0.lokr_w1": draw(2, 2),
        "lora_unet_mid_block_attentions_0_to_out_0.lokr_w2_a": draw(4, 1),
        "lora_unet_mid_block_attentions_0_to_out_0.lokr_w2_b": draw(1, 4),
    }  # fmt: skip
    files = []
    for tensors, metadata in ((plain, settings), (kohya, None), (lycoris, None), (plain, None)):
        text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
        save_file(tensors, directory / "sound.safetensors", metadata=text)
        files.append((directory / "sound.safetensors").read_bytes())
    return files


def split(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one_of(header: Header, rng: np.random.Generator) -> str:
    names = [name for name in header if name != "__metadata__"]
    return names[rng.integers(len(names))]


def rename(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    name = one_of(header, rng)
    word = WORDS[rng.integers(len(WORDS))]
    new = (
        word
        if rng.random() < 0.3
        else f"{name.split('.')[0]}.{word}"
        if rng.random() < 0.5
        else f"{name}{word}"
    )
    return joined({new if old == name else old: entry for old, entry in header.items()}, body)


def reshape(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    """Another shape, of the same number of elements more often than not."""
    entry = header[one_of(header, rng)]
    shape = list(entry["shape"])
    kind = rng.integers(5)
    if kind == 0:
        shape = shape[::-1]
    elif kind == 1:
        shape = [*shape, 1] if rng.random() < 0.5 else [1, *shape]
    elif kind == 2:
        shape = [int(np.prod(shape))]
    elif kind == 3:
        shape = [int(rng.choice([0, 1, 2, 3, 4, 2**31, 2**62])) for _ in range(rng.integers(6))]
    else:
        shape = [one // 2 if one % 2 == 0 else one * 2 for one in shape]
    entry["shape"] = shape
    return joined(header, body)


def retype(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    """Another type, and the shape that keeps the bytes where there is one."""
    entry = header[one_of(header, rng)]
    old, new = entry["dtype"], DTYPES[rng.integers(len(DTYPES))]
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    if entry["shape"] and isinstance(new, str):
        entry["shape"][0] = entry["shape"][0] * sizes.get(old, 1) // sizes.get(new, 1)
    entry["dtype"] = new
    return joined(header, body)


def revalue(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    """Other numbers: of an alpha, of a factor, of anything."""
    data = bytearray(body)
    begin, end = header[one_of(header, rng)]["data_offsets"]
    odd = rng.choice([0.0, -0.0, np.nan, np.inf, -1.0, 1e38, 1e-45]).astype(np.float32).tobytes()
    fill = odd if rng.random() < 0.5 else rng.bytes(4)
    data[begin:end] = (fill * (end - begin))[: end - begin]
    return joined(header, bytes(data))


def drop(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    """One tensor less, its bytes cut out."""
    name = one_of(header, rng)
    begin, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place - (end - begin) for place in entry["data_offsets"]]
    return joined(header, body[:begin] + body[end:])


def resay(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    """Other metadata: of a LoRA's settings, or none of them."""
    said = json.loads(
        header.get("__metadata__", {}).get("lora_adapter_metadata", '{"unet.r": 2, "unet.lora_alpha": 2}')
    )
    for _ in range(rng.integers(1, 4)):
        said[SETTINGS[rng.integers(len(SETTINGS))]] = VALUES[rng.integers(len(VALUES))]
    text = json.dumps(said) if rng.random() < 0.9 else str(said)
    return joined({"__metadata__": {"lora_adapter_metadata": text}, **header}, body)


def cut(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    data = joined(header, body)
    return data[: rng.integers(len(data))]


def flip(header: Header, body: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(joined(header, body))
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(min(len(data), 600))] = rng.integers(256)
    return bytes(data)


MUTATIONS: list[Callable[[Header, bytes, np.random.Generator], bytes]] = [
    rename, reshape, retype, revalue, drop, resay, cut, flip,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # numpy's, of numbers that are not finite
@pytest.mark.slow
def test_spoilt_files_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    sound = originals(tmp_path, rng)
    outcomes = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, mutate in zip(range(FILES), itertools.cycle(MUTATIONS), strict=False):
        data = mutate(*split(sound[rng.integers(len(sound))]), rng)
        if rng.random() < 0.2 and mutate not in (resay, cut, flip):
            data = MUTATIONS[rng.integers(len(MUTATIONS))](*split(data), rng)
        path = tmp_path / f"{number}.safetensors"  # to write over a file can wait for the disk
        path.write_bytes(data)
        try:
            for part, lora in read_loras(path, None, LAYERS).items():
                fused = fuse(BASE.get(part, {}), lora)
                assert all(leaf.shape == BASE[part][name].shape for name, leaf in fused.items())
            outcomes["read"] += 1
        except InputError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 6000, (number, mutate.__name__, text[:300])
            outcomes["refused"] += 1
        path.unlink()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB more at the height"
    assert min(outcomes.values()) > FILES / 20, outcomes
