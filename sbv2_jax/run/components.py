"""The components of a run as their files describe them: small JSON files and headers, no weights."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from sbv2_jax.convert.formats.component import check_component
from sbv2_jax.convert.formats.files import file_of, read_json
from sbv2_jax.convert.formats.pipeline import PipelineParts, component_dir, load_pipeline, read_schedule
from sbv2_jax.convert.formats.published_shapes import family_of_config
from sbv2_jax.convert.formats.resolve import is_single_file, resolve
from sbv2_jax.convert.formats.single_file import directory_of
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError
from sbv2_jax.models import published
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.conditions import TOWERS
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.registry import network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair, load_fitting
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One component: its configuration, and the directory of its weights (None for a published shape)."""

    config: ModelConfig
    directory: Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a run, as their files describe them.

    `text_encoder_2` only for SDXL, and `zero_null` whether its null condition is zeros; `decoder` and `clip` only
    with the CLIP loss. `tokenizer` is that of the text encoders, `clip_tokenizer` that of the loss's CLIP, which may be
    the same; published shapes have none.
    """

    teacher: Part
    teacher_schedule: ScheduleConfig
    student: Part
    student_schedule: ScheduleConfig
    text_encoder: Part
    text_encoder_2: Part | None = None
    zero_null: bool = False
    vae: Part
    decoder: Part | None
    clip: Part | None
    clip_image: CLIPImageConfig | None
    pipeline: Path | None
    tokenizer: Tokenizer | TokenizerPair | None = None
    clip_tokenizer: Tokenizer | None = None

    @property
    def prompt_length(self) -> int:
        """The tokens of a prompt for the text encoders."""
        if self.tokenizer is not None:
            return self.tokenizer.max_length
        return self.text_encoder.config.max_position_embeddings

    @property
    def clip_prompt_length(self) -> int:
        """The tokens of a prompt for the loss's CLIP."""
        if self.clip_tokenizer is not None:
            return self.clip_tokenizer.max_length
        return self.clip.config.text_config.max_position_embeddings

    @property
    def text_encoders(self) -> dict[str, Part]:
        """The text towers by the name of their folder: one, or SDXL's two."""
        parts = dict(zip(TOWERS, (self.text_encoder, self.text_encoder_2), strict=True))
        return {name: part for name, part in parts.items() if part is not None}


def read_parts(config: ConfigDict, *, dry_run: bool = False) -> Parts:
    """Reads the configuration of every component that the run needs, and the headers of its weights.

    A dry run without the teacher's directory takes the published shapes of `config.architecture`.
    Raises InputError for what is missing, unsupported, or not of that architecture.
    """
    if dry_run and config.architecture and not Path(config.teacher).expanduser().exists():
        return _published_parts(config)
    pipeline = load_pipeline(config.teacher)
    teacher = _part(pipeline.component_dir("unet"))
    if config.architecture:
        _require_architecture(config.architecture, teacher)
    student, student_schedule = teacher, pipeline.schedule_config
    if config.student.init != "teacher":
        student, student_schedule = _student(config.student.init, teacher.config, pipeline.schedule_config)
    clip = clip_image = clip_tokenizer = decoder = None
    if config.clip.model:
        clip = _part(component_dir(resolve(config.clip.model), "clip"))
        clip_image = _clip_image(clip)
        clip_tokenizer = _clip_tokenizer(clip, pipeline)
        decoder = _decoder(config.clip.decoder, pipeline)
    return Parts(
        teacher=teacher,
        teacher_schedule=pipeline.schedule_config,
        student=student,
        student_schedule=student_schedule,
        **{name: _part(pipeline.component_dir(name)) for name in pipeline.text_encoders},
        zero_null=pipeline.zero_null,
        vae=_part(pipeline.component_dir("vae")),
        decoder=decoder,
        clip=clip,
        clip_image=clip_image,
        pipeline=pipeline.directory,
        tokenizer=pipeline.tokenizer,
        clip_tokenizer=clip_tokenizer,
    )


def latent_side(config: ConfigDict, parts: Parts) -> int:
    """Returns the height and width of the latents that a run trains with.

    Raises InputError for a resolution that the autoencoder does not divide, and where neither the configuration
    nor the teacher's UNet says one.
    """
    if not config.resolution:
        if parts.teacher.config.sample_size is None:
            raise InputError(f"{parts.teacher.directory} does not say its sample_size: set config.resolution")
        return parts.teacher.config.sample_size
    factor = parts.vae.config.downsampling
    if config.resolution % factor:
        raise InputError(f"config.resolution = {config.resolution} is not a multiple of the VAE's {factor}")
    return config.resolution // factor


def _part(directory: Path) -> Part:
    return Part(config=check_component(directory), directory=directory)


def _student(
    reference: str, teacher: UNetConfig, teacher_schedule: ScheduleConfig
) -> tuple[Part, ScheduleConfig]:
    # A file's shapes say less than the teacher's configuration does, the number of heads above all.
    directory = directory_of(reference, like=teacher) if is_single_file(reference) else resolve(reference)
    part = _part(component_dir(directory, "unet"))
    # A UNet on its own says nothing of its schedule: it must be the teacher's.
    return part, teacher_schedule if part.directory == directory else read_schedule(directory)


def _decoder(reference: str, pipeline: PipelineParts) -> Part:
    if reference in ("vae", "vae_tiny"):
        return _part(pipeline.component_dir(reference))
    return _part(component_dir(resolve(reference), "vae_tiny"))


def _clip_image(clip: Part) -> CLIPImageConfig:
    """Reads how the CLIP takes its pictures; without a file of its own, as OpenAI's do, at its size."""
    size = clip.config.vision_config.image_size
    if not (clip.directory / "preprocessor_config.json").exists():
        return CLIPImageConfig(size=size, crop_size=size)
    path = file_of(clip.directory, "preprocessor_config.json")
    image = CLIPImageConfig.from_dict(read_json(path), str(path))
    if image.size != size:
        raise InputError(f"{path} has size={image.size}; the network takes {size}")
    return image


def _clip_tokenizer(clip: Part, pipeline: PipelineParts) -> Tokenizer:
    """Reads the tokenizer of the loss's CLIP: without files of its own, the pipeline's first one."""
    own = (clip.directory / "tokenizer_config.json").is_file()
    directory = clip.directory if own else pipeline.component_dir("tokenizer")
    return load_fitting(directory, clip.config.text_config)


def _published_parts(config: ConfigDict) -> Parts:
    shapes = published.ARCHITECTURES.get(config.architecture)
    if shapes is None:
        raise InputError(
            f"config.architecture = {config.architecture!r} is none of {', '.join(published.ARCHITECTURES)}"
        )
    unet = Part(config=UNetConfig.from_dict(shapes["unet"]), directory=None)
    vae = Part(config=VAEConfig.from_dict(shapes["vae"]), directory=None)
    schedule = ScheduleConfig.from_dict(shapes["scheduler"])
    clip = clip_image = decoder = None
    if config.clip.model:
        clip = Part(config=CLIPConfig.from_dict(published.CLIP_VIT_B32), directory=None)
        clip_image = CLIPImageConfig()
        tiny = Part(config=TinyVAEConfig.from_dict(published.TINY_VAE), directory=None)
        decoder = vae if config.clip.decoder == "vae" else tiny
    return Parts(
        teacher=unet,
        teacher_schedule=schedule,
        student=unet,
        student_schedule=schedule,
        **{
            name: Part(config=CLIPTextConfig.from_dict(shapes[name]), directory=None)
            for name in TOWERS
            if name in shapes
        },
        vae=vae,
        decoder=decoder,
        clip=clip,
        clip_image=clip_image,
        pipeline=None,
    )


def _require_architecture(architecture: str, teacher: Part) -> None:
    if architecture not in published.ARCHITECTURES:
        raise InputError(
            f"config.architecture = {architecture!r} is none of {', '.join(published.ARCHITECTURES)}"
        )
    want = network(UNetConfig.from_dict(published.ARCHITECTURES[architecture]["unet"])).shapes
    if want != network(teacher.config).shapes:
        raise InputError(
            f"{teacher.directory} does not have the shapes of config.architecture = {architecture!r}, for which "
            'batch and mesh were planned: plan them for it and set config.architecture = ""'
            f"{family_of_config(teacher.config)}"
        )
