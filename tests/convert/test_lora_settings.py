"""What is said of a LoRA, in its tensors and its metadata: read where it is right, refused where it cannot be."""

import functools
from pathlib import Path

import numpy as np
import pytest
from rewritten_loras import ALPHA, RANK, rewritten, with_alphas

from sbv2_jax.convert.lora.files import read_lora
from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.errors import InputError


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A LoRA of fourteen layers."""
    rng, factors = np.random.default_rng(0), {}
    for index in range(6):
        for layer in ("to_q", "ff.net.0"):
            factors[f"down_blocks.{index}.{layer}.lora.down.kernel"] = rng.standard_normal(
                (8, RANK), np.float32
            )
            factors[f"down_blocks.{index}.{layer}.lora.up.kernel"] = rng.standard_normal(
                (RANK, 8), np.float32
            )
    for layer in ("time_embedding.linear_1", "time_embedding.linear_2"):
        factors[f"{layer}.lora.down.kernel"] = rng.standard_normal((8, RANK), np.float32)
        factors[f"{layer}.lora.up.kernel"] = rng.standard_normal((RANK, 32), np.float32)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(path, factors, ALPHA)
    return path


NUMBERS = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.uint16]


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.__name__)
def test_an_alpha_is_a_number_of_any_type(file, tmp_path, dtype):
    path = rewritten(file, tmp_path, lambda tensors: with_alphas(tensors, np.array([6], dtype)))
    assert set(read_lora(path).scales.values()) == {6 / RANK}


def test_factors_of_any_float_type_are_read(file, tmp_path):
    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {name: one.astype(np.float64) for name, one in tensors.items()}

    want, got = read_lora(file), read_lora(rewritten(file, tmp_path, double))
    assert all(np.array_equal(got.factors[name], leaf) for name, leaf in want.factors.items())


LAYER = "unet.time_embedding.linear_1"
SETTINGS = {"unet.r": RANK, "unet.lora_alpha": ALPHA}


def drop_half(tensors: dict[str, np.ndarray]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def convolution(tensors: dict[str, np.ndarray]) -> None:
    tensors["unet.conv_in.lora_A.weight"] = np.ones((RANK, 4, 3, 3), np.float32)
    tensors["unet.conv_in.lora_B.weight"] = np.ones((8, RANK, 3, 3), np.float32)


def one_axis(tensors: dict[str, np.ndarray]) -> None:
    tensors["unet.conv_in.lora_A.weight"] = np.ones((RANK, 4, 3), np.float32)
    tensors["unet.conv_in.lora_B.weight"] = np.ones((8, RANK, 3), np.float32)


def named(end: str):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.{end}"] = np.ones(32, np.float32)

    return change


def twice(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora.down.weight"] = tensors[f"{LAYER}.lora_A.weight"]


def integers(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = np.ones((RANK, 8), np.int32)


def not_finite(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora_A.weight"][1, 1] = np.nan


def every_layer(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "lora_B" in name]:
        del tensors[name]


OTHER_ALPHAS = functools.partial(with_alphas, alpha=3.0)
ONE_OF_MANY = "has only one of its two factors; .*; and 4 more$"
REFUSED = {
    "half": (drop_half, SETTINGS, "time_embedding.linear_1 has only one of its two factors"),
    "all halves": (every_layer, SETTINGS, ONE_OF_MANY),
    "convolution": (
        convolution,
        SETTINGS,
        r"conv_in has factors of shapes \(4, 4, 3, 3\) and \(8, 4, 3, 3\)",
    ),
    "one axis": (one_axis, SETTINGS, r"conv_in has factors of shapes \(4, 4, 3\)"),
    "bias": (
        named("lora_B.bias"),
        SETTINGS,
        r"biases \(lora_bias\), which are not .*: .*linear_1.lora_B.bias",
    ),
    "glora": (named("a1.weight"), {}, "it has GLoRA, which"),
    "oft": (named("oft_blocks"), {}, "it has OFT, which"),
    "full": (named("diff"), {}, "it has full differences of weights, which"),
    "norm": (named("w_norm"), {}, "it has differences of normalisations, which"),
    "ia3": (named("on_input"), {}, "it has IA3, which"),
    "adalora": (named("lora_E"), {}, "it has AdaLoRA, which"),
    "unknown": (named("new_kind"), {}, "in 1 tensors: unet.time_embedding.linear_1.new_kind"),
    "two spellings": (twice, SETTINGS, "in two spellings"),
    "integers": (integers, SETTINGS, "has type I32"),
    "nan": (not_finite, SETTINGS, "NaN or infinite values in 1 tensor.s.: time_embedding.linear_1"),
    "other alphas": (
        OTHER_ALPHAS,
        SETTINGS,
        "metadata .* is not that by the .alpha tensors .* has 2 and 0.75",
    ),
    "alphas": (
        functools.partial(with_alphas, alpha=np.ones(2)),
        {},
        r"alpha of shape \(2,\), not one number",
    ),
    "zero": (functools.partial(with_alphas, alpha=0.0), {}, "an alpha of 0, which kohya's scripts take as"),
    "dora": (None, SETTINGS | {"unet.use_dora": True}, "says use_dora=True, and .* magnitudes for 0 of"),
    "loha": (None, SETTINGS | {"unet.peft_type": "LOHA"}, "says LOHA, and .* holds LORA"),
    "vera": (None, SETTINGS | {"unet.peft_type": "VERA"}, "peft_type 'VERA' is not supported"),
    "odd type": (None, SETTINGS | {"unet.peft_type": ["LORA"]}, "peft_type .* is not supported"),
    "rslora": (None, SETTINGS | {"unet.use_rslora": "yes"}, "use_rslora is 'yes', neither true nor false"),
    "pissa": (
        None,
        SETTINGS | {"unet.init_lora_weights": "pissa_niter_4"},
        "init_lora_weights='pissa_niter_4'",
    ),
    "biases": (None, SETTINGS | {"unet.bias": "all"}, "not supported: bias='all'"),
    "saved": (None, SETTINGS | {"unet.modules_to_save": ["conv_in"]}, "modules_to_save="),
    "new": (None, SETTINGS | {"unet.use_tomorrow": True}, "not supported: use_tomorrow='True'"),
    "rank": (None, SETTINGS | {"unet.r": 8}, "has 4, not 8"),
    "targets": (None, SETTINGS | {"unet.target_modules": ["to_q"]}, "target_modules do not name .*ff.net"),
    "no alpha": (None, {"unet.r": RANK}, "lora_alpha is 'None', not a finite number"),
    "truth": (None, {"unet.r": RANK, "unet.lora_alpha": True}, "lora_alpha is 'True', not a finite number"),
    "pattern": (None, SETTINGS | {"unet.alpha_pattern": {"(a+)+": 1}}, "is not supported"),
    "no pattern": (None, SETTINGS | {"unet.rank_pattern": ["to_q"]}, "rank_pattern is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_right_is_refused_in_one_line(file, tmp_path, case):
    change, metadata, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        read_lora(rewritten(file, tmp_path, change, **metadata))
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_settings_that_change_nothing_are_no_error(file, tmp_path):
    free = {"fan_in_fan_out": True, "lora_dropout": 0.1, "task_type": None, "layer_replication": None}
    settings = SETTINGS | {f"unet.{name}": value for name, value in free.items()}
    assert set(read_lora(rewritten(file, tmp_path, **settings)).scales.values()) == {ALPHA / RANK}
