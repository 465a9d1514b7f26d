"""LoHa, LoKr, LoCon and DoRA, and PEFT's folders of every kind, against PEFT and the published formulas."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import UNet2DConditionModel as TorchUNet
from lora_readers import merged_by_peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_pipeline import write_one_step

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.names import to_torch
from sbv2_jax.convert.lora.files import layers_of, read_lora
from sbv2_jax.convert.lora.fuse import fuse, fuse_file
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network

DENSE = ["to_q", "to_v", "to_out.0", "linear_1"]
LAYERS = [*DENSE, "conv1", "conv_in", "conv_shortcut"]
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_one_step(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(pipeline) -> dict[str, np.ndarray]:
    return load_component(pipeline / "unet").params


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(r=4, init_lora_weights=False, **{"lora_alpha": 6, "target_modules": LAYERS} | settings)


def lycoris(kind: type, **settings: object) -> LoHaConfig | LoKrConfig:
    return kind(init_weights=False, **{"r": 4, "alpha": 6, "target_modules": LAYERS} | settings)


PATTERNS = {
    "rank_pattern": {"attn1.to_q": 2, r".*attn2\.to_(q|v)": 3},
    "alpha_pattern": {f"^{FIRST}": 5, "to_v": 3, "conv.": 2},
}
FOLDERS = {
    "plain": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "patterns": lora(**PATTERNS),
    "patterns, rank-stabilised": lora(use_rslora=True, **PATTERNS),
    "regular expression": lora(target_modules=r".*attn1\.to_(q|k|v)"),
    "fan_in_fan_out": lora(fan_in_fan_out=True, target_modules=DENSE),
    "dora": lora(use_dora=True),
    "dora, rank-stabilised": lora(use_dora=True, use_rslora=True, **PATTERNS),
    "loha": lycoris(LoHaConfig),
    "loha, by pixel": lycoris(LoHaConfig, use_effective_conv2d=True, rank_pattern={"to_q": 2}),
    "lokr, whole": lycoris(LoKrConfig),
    "lokr, of low rank": lycoris(LoKrConfig, r=1, decompose_both=True, decompose_factor=4),
    "lokr, by pixel": lycoris(LoKrConfig, r=1, decompose_both=True, use_effective_conv2d=True),
    "lokr, patterns": lycoris(LoKrConfig, rank_pattern={"to_q": 64}, alpha_pattern={"conv1": 3}),
}


def write_folder(pipeline: Path, config: object, directory: Path) -> TorchUNet:
    torch.manual_seed(5)
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    model = get_peft_model(unet, config)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "lora_magnitude" in name:
                leaf *= 1 + torch.rand_like(leaf)
            elif "hada_" in name or "lokr_" in name:
                leaf.copy_(0.3 * torch.randn_like(leaf))
    model.save_pretrained(directory)
    return unet


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.slow
def test_a_folder_of_peft_is_fused_as_peft_merges_it(pipeline, base, tmp_path, case):
    unet = write_folder(pipeline, FOLDERS[case], tmp_path / "lora")
    update = read_lora(tmp_path / "lora", layers=layers_of(base))
    got = fuse(base, update)
    want = merged_by_peft(unet, network(load_component(pipeline / "unet").config).shapes)
    changed = {name for name in base if not np.array_equal(got[name], base[name])}
    assert changed == {f"{layer}.kernel" for layer in update.layers} and len(changed) > 3
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_stands_beside_a_file_of_peft_is_looked_at(pipeline, base, tmp_path):
    folder = tmp_path / "lora"
    write_folder(pipeline, FOLDERS["plain"], folder)
    layers = layers_of(base)
    file = folder / "adapter_model.safetensors"
    want = read_lora(folder, layers=layers).scales
    assert set(want.values()) == {1.5}
    assert read_lora(str(file), layers=layers).scales == want
    renamed = folder / "style.safetensors"
    shutil.copy(file, renamed)
    assert read_lora(renamed, layers=layers).scales == want, "PEFT's names tell"
    assert read_lora(folder, 6, layers=layers).scales == want
    with pytest.raises(
        InputError, match=r"adapter_config.json is not that by --alpha=8.0, .* has 1.5 and 2;"
    ):
        read_lora(folder, 8, layers=layers)
    for changes, message in (
        ({"r": 8}, "says other ranks than the tensors have: .* has 4, not 8"),
        ({"peft_type": "BOFT"}, "peft_type 'BOFT' is not supported"),
        ({"use_dora": True}, "says use_dora=True"),
        ({"target_modules": ["to_q"]}, "its target_modules do not name .*conv_in"),
        ({"bias": "lora_only"}, "not supported: bias='lora_only'"),
        ({"init_lora_weights": "olora"}, "not supported: init_lora_weights='olora'"),
        ({"alpha_pattern": {"to_q": "8"}}, "alpha_pattern is '8', not a finite number"),
    ):
        before = (folder / "adapter_config.json").read_text()
        edit(folder, **changes)
        with pytest.raises(InputError, match=message) as error:
            read_lora(folder, layers=layers)
        assert str(folder / "adapter_config.json") in str(error.value) and "\n" not in str(error.value)
        (folder / "adapter_config.json").write_text(before)
    (folder / "adapter_config.json").unlink()
    for one in (folder, renamed):
        with pytest.raises(
            InputError, match=r"alpha \(no adapter_config.json\): give it as --alpha=NUMBER, or"
        ):
            read_lora(one, layers=layers)
    assert read_lora(renamed, 6, layers=layers).scales == want
    assert set(read_lora(renamed, "rank", layers=layers).scales.values()) == {1.0}


def torch_weights(base: dict[str, np.ndarray], layer: str) -> torch.Tensor:
    return torch.tensor(np.array(to_torch(".kernel", base[f"{layer}.kernel"])))


def norm_over(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """The norms that divide, over all axes but one."""
    return weight.pow(2).sum([one for one in range(weight.ndim) if one != axis], keepdim=True).sqrt()


CORE = "i j k l, j r, i p -> p r k l"  # as LyCORIS's and ComfyUI's code writes it


def update_of(kind: str, weight: torch.Tensor, draw) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Tensors of a kind for one layer, what they add at alpha = rank, and the rank."""
    (out, inner), pixels = weight.shape[:2], tuple(weight.shape[2:])
    flat = inner * (pixels[0] * pixels[1] if pixels else 1)
    if kind == "locon":
        one = (1, 1) if pixels else ()
        parts = {"lora_down.weight": draw(3, inner, *pixels), "lora_up.weight": draw(out, 3, *one)}
        down, up = parts.values()
        return parts, up.reshape(out, 3) @ down.reshape(3, -1), 3
    if kind == "locon, mid":
        down, mid, up = draw(3, inner, 1, 1), draw(3, 3, *pixels), draw(out, 3, 1, 1)
        delta = torch.einsum("m n ..., i m, n j -> i j ...", mid, up[:, :, 0, 0], down[:, :, 0, 0])
        return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, delta, 3
    if kind == "loha":
        parts = {
            f"hada_w{one}_{side}": draw(*shape)
            for one in (1, 2)
            for side, shape in (("a", (out, 3)), ("b", (3, flat)))
        }
        a, b, c, d = parts.values()
        return parts, (a @ b) * (c @ d), 3
    if kind == "loha, core":
        parts = {
            f"hada_w{one}_{side}": draw(3, width)
            for one in (1, 2)
            for side, width in (("a", out), ("b", inner))
        }
        parts |= {"hada_t1": draw(3, 3, *pixels), "hada_t2": draw(3, 3, *pixels)}
        a, b, c, d, first, second = parts.values()
        return parts, torch.einsum(CORE, first, b, a) * torch.einsum(CORE, second, d, c), 3
    if kind == "lokr":
        parts = {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(out // 2, 3), "lokr_w2_b": draw(3, flat // 2)}
        w1, a, b = parts.values()
        return parts, torch.kron(w1, a @ b), 3
    if kind == "lokr, whole":
        parts = {"lokr_w1": draw(4, 2), "lokr_w2": draw(out // 4, inner // 2, *pixels)}
        w1, w2 = parts.values()
        return parts, torch.kron(w1[:, :, None, None] if pixels else w1, w2), 0
    parts = {
        "lokr_w1_a": draw(2, 3), "lokr_w1_b": draw(3, 2), "lokr_t2": draw(3, 3, *pixels),
        "lokr_w2_a": draw(3, out // 2), "lokr_w2_b": draw(3, inner // 2),
    }  # fmt: skip
    a, b, core, c, d = parts.values()
    return parts, torch.kron((a @ b)[:, :, None, None], torch.einsum(CORE, core, d, c)), 3


CONV, POINT = "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"
KINDS = {
    "locon": (FIRST, CONV, POINT),
    "locon, mid": (CONV, POINT),
    "loha": (FIRST, CONV, POINT),
    "loha, core": (CONV,),
    "lokr": (FIRST, CONV, POINT),
    "lokr, whole": (FIRST, CONV),
    "lokr, core": (CONV,),
}


@pytest.mark.parametrize("dora", [None, "out", "in"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_lycoris_is_fused_by_its_formula(pipeline, base, tmp_path, kind, dora):
    """W + alpha / rank * update; with `dora_scale` m V / |V| for that V, over outputs or over inputs."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors, want = {}, {}
    for layer in KINDS[kind]:
        weight = torch_weights(base, layer)
        parts, delta, rank = update_of(kind, weight, draw)
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{flat}.{name}": part for name, part in parts.items()} | {
            f"{flat}.alpha": torch.tensor(2.0)
        }
        total = weight + (2 / rank if rank else 1) * delta.reshape(weight.shape)
        if dora is not None:
            axis = ("out", "in").index(dora)
            norm = norm_over(total, axis)
            magnitude = torch.rand(norm.shape, generator=generator) + 0.5
            tensors[f"{flat}.dora_scale"] = magnitude
            total = magnitude * total / norm
        want[layer] = total
    path = tmp_path / "lycoris.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    got = fuse(base, read_lora(path, layers=layers_of(base)))
    for layer, weight in want.items():
        assert relative_error(to_torch(".kernel", got[f"{layer}.kernel"]), weight) < 1e-5, layer
    for name in base:
        if name.removesuffix(".kernel") not in want:
            assert got[name] is base[name]
    if dora:
        for request in (f"{path}:0.5", [path, path]):
            with pytest.raises(
                InputError, match="a DoRA with another strength than 1, or by another LoRA too"
            ):
                fuse_file(open_model(pipeline), request, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def spoilt(tensors: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    flat = next(iter(tensors)).split(".")[0]
    changed = tensors | {f"{flat}.{name}": one for name, one in changes.items()}
    return {name: one for name, one in changed.items() if one is not None}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loha", {"hada_w2_b": None}),
        ("loha", {"hada_w1_b": torch.ones(2, 72)}),
        ("loha", {"hada_t1": torch.ones(3, 3, 3, 3)}),
        ("loha, core", {"hada_t1": torch.ones(3, 2, 3, 3)}),
        ("lokr", {"lokr_w1": None}),
        ("lokr", {"lokr_w2": torch.ones(4, 36)}),
        ("lokr", {"lokr_w1": torch.ones(2, 2, 1, 1)}),
        ("locon, mid", {"lora_mid.weight": torch.ones(3, 2, 3, 3)}),
        ("locon, mid", {"lora_up.weight": None}),
        ("locon", {"hada_w1_a": torch.ones(8, 3)}),
    ],
)
def test_a_layer_of_which_a_part_is_missing_or_does_not_fit_is_named(base, tmp_path, kind, changes):
    parts, _, _ = update_of(kind, torch_weights(base, CONV), lambda *shape: torch.ones(shape))
    flat = f"lora_unet_{CONV.replace('.', '_')}"
    tensors = spoilt({f"{flat}.{name}": one for name, one in parts.items()}, **changes)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(InputError, match=f"is not a whole LoRA: {CONV} has "):
        read_lora(tmp_path / "spoilt.safetensors", layers=layers_of(base))


def test_an_update_of_another_size_is_refused_before_it_is_computed(base, tmp_path):
    huge = {f"{FIRST}.lokr_w1": torch.ones(3000, 3000), f"{FIRST}.lokr_w2": torch.ones(3000, 3000)}
    save_file({f"unet.{name}": one for name, one in huge.items()}, tmp_path / "huge.safetensors")
    update = read_lora(tmp_path / "huge.safetensors")
    with pytest.raises(InputError, match=r"to_q is \(8, 8\), the LoRA's is \(9000000, 9000000\)"):
        fuse(base, update)


def test_a_folder_of_diffusers_one_of_another_name_and_a_hub_id(pipeline, base, tmp_path, monkeypatch):
    write_folder(pipeline, FOLDERS["plain"], tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    tensors = {name.replace("base_model.model.", "unet."): one for name, one in tensors.items()}
    asked = []

    def snapshot_download(repository, **settings):
        asked.append((repository, settings["allow_patterns"]))
        return str(tmp_path / repository.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for folder, name in (("diffusers", "pytorch_lora_weights"), ("own", "pixel-art"), ("two", "pixel-art")):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / f"{name}.safetensors")
    shutil.copy(tmp_path / "own" / "pixel-art.safetensors", tmp_path / "two" / "other.safetensors")
    layers = layers_of(base)
    want = read_lora(tmp_path / "peft", layers=layers)
    for source in ("diffusers", "own"):
        for one in (tmp_path / source, f"someone/{source}"):
            got = read_lora(one, layers=layers)
            assert all(np.array_equal(got.factors[name], leaf) for name, leaf in want.factors.items())
            assert set(got.scales.values()) == {1.0}
    assert read_lora("someone/peft", layers=layers).scales == want.scales
    assert {repository for repository, _ in asked} == {"someone/diffusers", "someone/own", "someone/peft"}
    assert "adapter_model*.safetensors" in asked[0][1] and "*.safetensors" not in asked[0][1]
    with pytest.raises(InputError, match="name one of them, other.safetensors, pixel-art.safetensors"):
        read_lora(tmp_path / "two", layers=layers)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(
        InputError, match=r"no safetensors file, but pickles \(adapter_model.bin\), which can run"
    ):
        read_lora(tmp_path / "none", layers=layers)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_lora("~/peft", layers=layers).scales == want.scales
