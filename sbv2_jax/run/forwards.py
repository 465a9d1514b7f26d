"""What a run costs in forwards of the UNet, by its configuration: what runs on any machine are compared by."""

from typing import NamedTuple

from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import is_guided


class Forwards(NamedTuple):
    """Forwards of the UNet for each image of a step: those of the teacher, and all, the teacher's among them."""

    teacher: float
    all: float


def forwards_of_an_image(config: ConfigDict) -> Forwards:
    """Returns the forwards for each image of a step; where chance decides, their mean.

    Backward passes are not counted, nor are text encoder, decoder and CLIP. The student has one forward, and its
    earlier steps where it has several, of which a step takes 0 to n - 1 alike. The VSD term has one or two of the
    teacher and of the score model, whose own update is one; each further update draws a sample of its own.
    """
    student = 1.0 + max(0, len(config.student.timesteps) - 1) / 2
    if "vsd" not in config.terms:
        return Forwards(0.0, student)
    guidance = config.vsd.guidance
    # Of a range the guidance is applied whatever it is.
    teacher = 2.0 if isinstance(guidance, list | tuple) or is_guided(guidance) else 1.0
    score = 2.0 if is_guided(config.vsd.score_guidance) else 1.0
    further = config.score.updates_per_step - 1
    return Forwards(teacher, student + teacher + score + 1.0 + further * (student + 1.0))
