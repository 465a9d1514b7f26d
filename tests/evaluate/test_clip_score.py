"""The CLIP score against torchmetrics' own formula over transformers' CLIP and image processor."""

import numpy as np
import torch
from conftest import measured
from PIL import Image
from tiny_pipeline import write_pipeline
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.evaluate.extractors.image_text import image_text
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.tokenizer import load_tokenizer


def test_clip_score_is_the_mean_cosine_of_transformers(tmp_path, rng):
    path = write_pipeline(tmp_path)
    pictures = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    captions = ["a cat", "a red house", "two birds", "a", "a big tree"]
    size = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessorPil(**size)([Image.fromarray(one) for one in pictures], return_tensors="pt")
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    ids = tokenizer(
        captions, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    ).input_ids
    clip = CLIPModel.from_pretrained(path / "clip")
    with torch.inference_mode():
        out = clip(input_ids=ids, pixel_values=pixels.pixel_values)
    expected = float((out.image_embeds * out.text_embeds).sum(-1).mean())

    ours = image_text(
        load_component(path / "clip"),
        load_tokenizer(path / "tokenizer"),
        CLIPImageConfig(size=32, crop_size=32),
    )
    similarity = ours.similarity(pictures, captions)
    score = METRICS["clip_score"].measure(similarity=similarity)["clip_score"]
    assert abs(expected) > 1e-3
    assert measured(abs(score - expected)) < 1e-6
