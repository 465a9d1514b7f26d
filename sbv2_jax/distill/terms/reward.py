"""The clamped reward: a sample's picture is to please people, up to a bound, beside agreeing with its prompt."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from sbv2_jax.distill.terms.clip import ClampedCLIP


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClampedReward(ClampedCLIP):
    """The clamped CLIP loss of a CLIP that was fitted to people's choices, such as HPSv2 (SwiftBrush v2, section 8.1).

    Its cosine is the reward: HPSv2's published figures are a hundred times that.
    """

    name: ClassVar[str] = "reward"
    columns: ClassVar[Mapping[str, str]] = {"reward_input_ids": "reward"}
