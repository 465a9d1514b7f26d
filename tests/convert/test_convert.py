"""Model directories that diffusers and transformers wrote, read and written back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import relative_error
from their_models import MODELS, TINY_VAE, TYPES, UNET, clip, listening, rewrite, their_model

from sbv2_jax.convert.formats.component import check_component, load_component, load_config, save_component
from sbv2_jax.convert.formats.names import params_from_torch, torch_names
from sbv2_jax.convert.formats.published_shapes import torch_shapes
from sbv2_jax.errors import InputError
from sbv2_jax.models import published
from sbv2_jax.models.registry import class_of, config_class, network
from sbv2_jax.models.unet import Execution, UNetConfig


def state_dict(model: torch.nn.Module) -> dict[str, bytes]:
    """Returns name -> type, shape and bytes of every tensor."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }  # fmt: skip


@pytest.fixture
def warnings_logged():
    with listening() as messages:
        yield messages


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_byte_identical_and_loads_without_a_warning(
    tmp_path, name, dtype, sharded, warnings_logged
):
    theirs = their_model(name).to(dtype)
    limit = 10_000 if sharded else 10**9
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == sharded
    warnings_logged.clear()  # transformers warns of its own when it shards

    part = load_component(tmp_path / "theirs")
    assert class_of(part.config) == name
    assert {array.dtype for array in part.params.values()} == {TYPES[dtype]}
    assert {n: a.shape for n, a in part.params.items()} == {
        n: s.shape for n, s in network(part.config).shapes.items()
    }

    save_component(tmp_path / "ours", part.config, part.params, max_shard_bytes=limit)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == sharded
    again = load_component(tmp_path / "ours")
    assert again.config == part.config
    assert all(again.params[n].tobytes() == part.params[n].tobytes() for n in part.params)

    # diffusers loads float32 unless told otherwise, transformers what the file holds.
    asked = {} if name.startswith("CLIP") else {"torch_dtype": dtype}
    reloaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, **asked)
    assert {key: list(found) for key, found in info.items() if found} == {}
    assert warnings_logged == []
    assert state_dict(reloaded) == state_dict(theirs)
    assert (tmp_path / "ours" / "config.json").stat().st_mode & 0o077 == 0o044


@pytest.mark.parametrize("name", ["AutoencoderTiny", "CLIPModel"])
def test_their_warnings_do_reach_these_tests(tmp_path, name, warnings_logged):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]})
    type(theirs).from_pretrained(tmp_path)
    assert warnings_logged


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_that_is_written_means_the_same_to_them(tmp_path, name):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    part = load_component(tmp_path / "theirs")
    save_component(tmp_path / "ours", part.config, part.params)
    before, after = (type(theirs).from_pretrained(tmp_path / side).config for side in ("theirs", "ours"))
    if name.startswith("CLIP"):
        before, after = before.to_dict(), after.to_dict()
        for values in (before, after):
            values.pop("dtype", None), values.pop("transformers_version", None)
            for tower in ("text_config", "vision_config"):
                values.get(tower, {}).pop("dtype", None)
    before, after = ({k: v for k, v in dict(x).items() if not k.startswith("_")} for x in (before, after))
    assert json.dumps(before, sort_keys=True) == json.dumps(after, sort_keys=True)


def test_a_loaded_network_computes_what_theirs_does(tmp_path, rng):
    theirs = their_model("UNet2DConditionModel")
    theirs.save_pretrained(tmp_path)
    part = load_component(tmp_path)
    x, context = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 5, 24), np.float32)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor([3, 999]), torch.from_numpy(context)
        ).sample
    ours = jax.jit(network(part.config, execution=Execution(remat=True)).apply)
    got = ours(part.params, x, np.array([3, 999]), context)
    assert relative_error(got, want.permute(0, 2, 3, 1).numpy()) < 1e-4


def test_types_change_only_when_asked(tmp_path):
    theirs = their_model("AutoencoderTiny")
    theirs.save_pretrained(tmp_path / "theirs")
    kept = load_component(tmp_path / "theirs").params
    for asked in (jnp.bfloat16, np.float16, "bfloat16", "float32"):
        params = load_component(tmp_path / "theirs", dtype=asked).params
        assert {array.dtype for array in params.values()} == {jnp.dtype(asked)}
        for name, array in params.items():
            assert array.tobytes() == kept[name].astype(jnp.dtype(asked)).tobytes()
    part = load_component(tmp_path / "theirs")
    save_component(tmp_path / "half", part.config, part.params, dtype=jnp.float16)
    assert {a.dtype for a in load_component(tmp_path / "half").params.values()} == {np.dtype(np.float16)}
    for wrong in ("float64", "int8", "fp16", jnp.float8_e4m3fn):
        with pytest.raises(InputError, match="not supported"):
            load_component(tmp_path / "theirs", dtype=wrong)


def test_a_value_that_float16_cannot_hold_is_an_error(tmp_path):
    their_model("AutoencoderTiny").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"decoder.layers.0.bias": np.full(8, 1e6, np.float32)})
    with pytest.raises(InputError, match="decoder.layers.0.bias has values too large for float16"):
        load_component(tmp_path, dtype=np.float16)
    assert load_component(tmp_path, dtype="bfloat16").params["decoder.layers.0.bias"][0] > 9e5


def test_parameters_on_a_device_are_written_too(tmp_path):
    config = UNetConfig.from_dict(UNET)
    params = network(config).init(0)
    save_component(tmp_path / "x", config, jax.device_put(params))
    found = load_component(tmp_path / "x").params
    assert all(found[name].tobytes() == params[name].tobytes() for name in params)


def test_every_tensor_that_does_not_fit_is_listed_by_its_name_in_the_file(tmp_path):
    their_model("UNet2DConditionModel").save_pretrained(tmp_path)

    def spoil(tensors):
        del tensors["conv_in.weight"], tensors["mid_block.resnets.0.norm1.bias"]
        tensors["conv_out.weight"] = np.zeros((4, 16, 1, 1), np.float32)
        tensors["time_embedding.linear_1.weight"] = tensors["time_embedding.linear_1.weight"].T.copy()
        tensors["conv_out.bias"] = np.zeros(4, np.int32)
        tensors["conv_norm_out.bias"] = np.zeros(16, np.float64)
        tensors["ema.decay"] = np.zeros(3, np.float32)

    rewrite(tmp_path, spoil)
    with pytest.raises(InputError) as caught:
        load_component(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} does not fit its config.json in 7 tensors: ")
    for line in (
        "missing conv_in.weight (16, 4, 3, 3)",
        "missing mid_block.resnets.0.norm1.bias (24,)",
        "conv_out.weight has shape (4, 16, 1, 1), expected (4, 16, 3, 3)",
        "time_embedding.linear_1.weight has shape (16, 64), expected (64, 16)",
        "conv_out.bias has type I32, expected one of F32, BF16, F16",
        "conv_norm_out.bias has type F64, expected",
        "unexpected ema.decay (3,)",
    ):
        assert line in message
    assert "\n" not in message and "kernel" not in message


def test_nothing_is_read_before_all_is_checked(tmp_path, monkeypatch):
    their_model("AutoencoderTiny").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"extra": np.zeros(1, np.float32)})
    monkeypatch.setattr("sbv2_jax.convert.formats.weight_files.read_tensors", None)
    with pytest.raises(InputError, match="unexpected extra"):
        load_component(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "'UNet3DConditionModel' is not supported"),
        ({"_class_name": ["remote", "Code"]}, "is not supported"),
        ({"_class_name": "CLIPModel"}, "unknown field"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown field auto_map"),
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"block_out_channels": [16, 24, 32]}, "down_block_types must have 3 entries"),
    ],
)
def test_a_configuration_that_is_not_supported_names_file_and_field(tmp_path, change, message):
    their_model("UNet2DConditionModel").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as caught:
        load_component(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "'BertModel' is not supported"),
        ({"model_type": "bert"}, "names no supported class"),
        ({"architectures": ["CLIPTextModel", "CLIPModel"]}, "is not supported"),
        ({"architectures": ["CLIPModel"], "model_type": "clip_text_model"}, "model_type='clip_text_model'"),
        ({}, "names no supported class"),
    ],
)
def test_a_class_that_is_not_supported(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        load_config(tmp_path)


def test_a_transformers_file_without_architectures_goes_by_its_type(tmp_path):
    for name, kind in (("CLIPTextModel", "clip_text_model"), ("CLIPModel", "clip")):
        their_model(name).save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        assert values.pop("architectures") == [name] and values["model_type"] == kind
        path.write_text(json.dumps(values))
        part = load_component(tmp_path / name)
        assert class_of(part.config) == name
        save_component(tmp_path / f"{name} again", part.config, part.params)
        assert json.loads((tmp_path / f"{name} again" / "config.json").read_text())["architectures"] == [name]


def test_missing_directories_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere does not exist"):
        load_component(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path}/file is a file"):
        load_component(tmp_path / "file")
    with pytest.raises(InputError, match=f"{tmp_path}/config.json does not exist"):
        load_component(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(InputError, match="has no diffusion_pytorch_model.safetensors"):
        load_component(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pickles only .diffusion_pytorch_model.bin.*safe_serialization"):
        load_component(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is not a safetensors file"):
        load_component(tmp_path)
    (tmp_path / ".gitattributes").write_text(
        "*.safetensors filter=lfs\n"
    )  # as every repository of the hub has
    with pytest.raises(InputError, match="symbolic link out"):
        load_component(tmp_path)


def test_saving_refuses_wrong_parameters_and_full_directories(tmp_path):
    config = config_class("AutoencoderTiny").from_dict(TINY_VAE)
    params = network(config).init(0)
    with pytest.raises(InputError, match="missing decoder.layers.0.bias"):
        save_component(
            tmp_path / "x", config, {n: a for n, a in params.items() if n != "decoder.layers.0.bias"}
        )
    with pytest.raises(InputError, match="int32"):
        save_component(tmp_path / "x", config, params | {"decoder.layers.0.bias": np.zeros(8, np.int32)})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "keep").write_text("mine")
    with pytest.raises(InputError, match="not empty; nothing was written"):
        save_component(tmp_path / "x", config, params)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "keep"]


def test_a_scalar_keeps_its_shape():
    config = config_class("CLIPModel").from_dict(json.loads(clip().config.to_json_string()))
    shapes = network(config).shapes
    assert torch_names(shapes)["logit_scale"] == "logit_scale" and shapes["logit_scale"].shape == ()
    tensors = {name: tensor.numpy() for name, tensor in clip().state_dict().items()}
    assert params_from_torch(tensors, shapes)["logit_scale"].shape == ()


def test_an_unknown_class_has_no_configuration():
    with pytest.raises(InputError, match="'Nothing' is not supported"):
        config_class("Nothing")


def test_a_list_in_an_error_has_an_end_and_the_count(tmp_path):
    theirs = their_model("UNet2DConditionModel")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()})
    count = 2 * len(theirs.state_dict())
    with pytest.raises(
        InputError, match=f"in {count} tensors: .*and {count - 10} more; .convert.py inspect"
    ) as caught:
        load_component(tmp_path)
    assert len(str(caught.value)) < 2000


def test_shapes_of_another_family_are_named(tmp_path):
    """The header of SDXL's UNet beside the configuration of SD 1.5's: a hole of 5 GB on the disk."""
    config = UNetConfig.from_dict(published.ARCHITECTURES["sdxl"]["unet"])
    header, end = {}, 0
    for name, shape in torch_shapes(network(config).shapes).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    values = {"_class_name": "UNet2DConditionModel"} | published.ARCHITECTURES["sd15"]["unet"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="and [0-9]+ more; .*; its shapes are those of sdxl$") as caught:
        check_component(tmp_path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "neutral",
    [
        {"next_years_field": None, "use_next_years_field": False},
        {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.75,
         "update_after_step": 0, "use_ema_warmup": True},
        {"attention_head_dim": [2.0, 4.0], "norm_num_groups": 8.0, "block_out_channels": [16.0, 24.0],
         "sample_size": 8.0, "norm_eps": 1e-5, "mid_block_scale_factor": 1.0, "freq_shift": 0.0, "conv_in_kernel": 3.0},
    ],
    ids=["null and false", "EMA helper", "numbers"],
)  # fmt: skip
def test_what_changes_nothing_in_a_configuration_is_no_error(tmp_path, neutral):
    their_model("UNet2DConditionModel").save_pretrained(tmp_path)
    want = load_component(tmp_path).config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | neutral))
    got = load_component(tmp_path).config
    assert got == want and hash(got) == hash(want)
    assert all(type(size) is int for size in got.block_out_channels)
    for name, value in {"next_years_field": "swish", "use_next_years_field": True, "scale": 2}.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        with pytest.raises(InputError, match=f"unknown field {name}="):
            load_component(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8"])
def test_a_single_number_may_be_of_any_type(tmp_path, dtype):
    their_model("CLIPModel").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"logit_scale": np.asarray(3, dtype)})
    assert load_component(tmp_path).params["logit_scale"] == 3
    assert load_component(tmp_path, dtype="bfloat16").params["logit_scale"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_whole_clip_serves_as_a_text_tower(tmp_path, name, caplog):
    """What the tower does not use is left out and told once."""
    tower = their_model(name)
    tower.save_pretrained(tmp_path)
    want = load_component(tmp_path).params
    whole = {key: tensor.numpy() for key, tensor in clip().state_dict().items()}

    def add(tensors):
        prefixed = {
            key if key.startswith("text_") else f"text_model.{key}": one for key, one in tensors.items()
        }
        return {key: one for key, one in whole.items() if not key.startswith("text_model.")} | prefixed

    rewrite(tmp_path, add)
    for _ in range(2):
        got = load_component(tmp_path).params
    assert got.keys() == want.keys() and all(got[key].tobytes() == want[key].tobytes() for key in want)
    told = [one.getMessage() for one in caplog.records if "are left out" in one.getMessage()]
    assert len(told) == 1 and "logit_scale" in told[0] and str(tmp_path) in told[0]
    rewrite(tmp_path, lambda tensors: tensors | {"audio_model.weight": np.ones(3, np.float32)})
    with pytest.raises(InputError, match="unexpected audio_model.weight"):
        load_component(tmp_path)
