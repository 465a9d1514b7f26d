"""What a run draws pictures with: its student or its teacher, beside the run's text encoder and autoencoder."""

from sbv2_jax.diffusion.schedule import Schedule, make_schedule
from sbv2_jax.generate.inference import Generator
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.run.build import Run


def student_generator(run: Run) -> Generator:
    """Returns the student's generator; it takes all weights, a LoRA merged."""
    return _generator(run, run.parts.student.config, run.method.student.schedule)


def teacher_generator(run: Run) -> Generator:
    """Returns the teacher's generator."""
    return _generator(run, run.parts.teacher.config, make_schedule(run.parts.teacher_schedule))


def _generator(run: Run, unet: UNetConfig, schedule: Schedule) -> Generator:
    vae = run.parts.vae.config
    return Generator(network(unet), schedule, run.method.text_encoder, network(vae), vae.scaling_factor)
