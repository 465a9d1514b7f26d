"""What a run draws pictures with: its student or its teacher, beside the run's text encoder and autoencoder."""

from sbv2_jax.diffusion.schedule import Schedule, make_schedule
from sbv2_jax.generate.inference import Generator
from sbv2_jax.models.conditions import TextEncoder
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.run.build import Run, text_encoder_of
from sbv2_jax.run.components import Parts


def student_generator(run: Run) -> Generator:
    """Returns the student's generator; it takes all weights, a LoRA merged."""
    student = run.parts.student.config
    return _generator(run.parts, run.method.text_encoder, student, run.method.student.schedule)


def teacher_generator(run: Run) -> Generator:
    """Returns the teacher's generator."""
    return teacher_of(run.parts, run.method.text_encoder)


def teacher_of(parts: Parts, text_encoder: TextEncoder | None = None) -> Generator:
    """Returns the generator of the teacher among these components; it needs no run."""
    schedule = make_schedule(parts.teacher_schedule)
    return _generator(parts, text_encoder or text_encoder_of(parts), parts.teacher.config, schedule)


def _generator(parts: Parts, text_encoder: TextEncoder, unet: UNetConfig, schedule: Schedule) -> Generator:
    vae = parts.vae.config
    return Generator(network(unet), schedule, text_encoder, network(vae), vae.scaling_factor)
