"""HPSv2: what people would prefer, by a CLIP ViT-H/14 that was fitted to their choices (Wu et al., 2023)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics.metric import Better, Metric, scores, weighted_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class HPSv2(Metric):
    """A hundred times the mean cosine of pictures and their prompts, as in the published tables.

    Those are of 800 prompts of each of four styles, one figure for each: `styles` names the style of each picture.
    """

    name = "hpsv2"
    reads = ("similarity",)
    styles: Sequence[str] = ()

    @property
    def better(self) -> Better:
        return dict.fromkeys(("hpsv2", *map(_figure, sorted(set(self.styles)))), "higher")

    def measure(self, *, similarity):
        values = 100.0 * scores("similarity", similarity)
        return {"hpsv2": float(values.mean())} | {
            _figure(style): float(values[rows].mean()) for style, rows in self._rows(values)
        }

    def resampled(self, weights, *, similarity):
        values = 100.0 * scores("similarity", similarity)
        found = {"hpsv2": weighted_mean(weights, values)}
        with np.errstate(invalid="ignore"):  # a draw without a prompt of a style says nothing of it
            return found | {
                _figure(style): weighted_mean(weights[:, rows], values[rows])
                for style, rows in self._rows(values)
            }

    def _rows(self, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
        if self.styles and len(self.styles) != len(values):
            raise InputError(f"{len(self.styles)} styles for {len(values)} pictures")
        named = np.array(self.styles)
        return [(style, np.flatnonzero(named == style)) for style in sorted(set(self.styles))]


def _figure(style: str) -> str:
    return f"hpsv2, {style}"
