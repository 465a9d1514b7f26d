"""Files that older versions of diffusers and transformers wrote."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from their_models import rewrite, their_model, weights_file

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.errors import InputError


@pytest.mark.parametrize("convolution", [False, True])
def test_the_old_names_of_the_autoencoders_attention(tmp_path, convolution):
    theirs = their_model("AutoencoderKL")
    theirs.save_pretrained(tmp_path)
    want = load_component(tmp_path).params
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new in [name for name in tensors if ".mid_block.attentions.0.to_" in name]:
            tensor = tensors.pop(new)
            layer = new.split("attentions.0.")[1].rpartition(".")[0]
            name = new.replace(layer, old[layer])
            tensors[name] = tensor[..., None, None] if convolution and tensor.ndim == 2 else tensor

    rewrite(tmp_path, rename)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(weights_file(tmp_path))
    got = load_component(tmp_path).params
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)

    rewrite(tmp_path, lambda t: t | {"decoder.mid_block.attentions.0.to_q.bias": np.zeros(16, np.float32)})
    with pytest.raises(
        InputError, match="two names each: .*query.bias and .*to_q.bias|to_q.bias and .*query"
    ):
        load_component(tmp_path)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
def test_files_of_older_transformers(tmp_path, name):
    """The prefix `text_model.`, and the buffers `position_ids` that are no parameters."""
    their_model(name).save_pretrained(tmp_path)
    want = load_component(tmp_path).params

    def older(tensors):
        bare = ("embeddings.", "encoder.", "final_layer_norm.")
        for key in [key for key in tensors if key.startswith(bare)]:
            tensors[f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
        if name == "CLIPModel":
            tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]

    rewrite(tmp_path, older)
    got = load_component(tmp_path).params
    assert all(got[key].tobytes() == want[key].tobytes() for key in want) and got.keys() == want.keys()
