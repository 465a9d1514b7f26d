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
from sbv2_jax.distill.terms.term import Source, needed_sources, term_classes
from sbv2_jax.errors import InputError
from sbv2_jax.models import published
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.conditions import TOWERS
from sbv2_jax.models.config import AutoencoderConfig, C, ModelConfig, of_kind
from sbv2_jax.models.part import Part
from sbv2_jax.models.registry import network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair, load_fitting
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.run.directory import EXPORT, is_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a run, as their files describe them.

    `text_encoder_2` only for SDXL, and `zero_null` whether its null condition is zeros; `networks` are the frozen
    networks that the terms of the objective need, by the names that they have for them. `tokenizer` is that of the
    text encoders; published shapes have none.
    """

    teacher: Part[UNetConfig]
    teacher_schedule: ScheduleConfig
    student: Part[UNetConfig]
    student_schedule: ScheduleConfig
    text_encoder: Part[CLIPTextConfig]
    text_encoder_2: Part[CLIPTextConfig] | None = None
    zero_null: bool = False
    vae: Part[AutoencoderConfig]
    networks: dict[str, Part[ModelConfig]] = dataclasses.field(default_factory=dict)
    pipeline: Path | None
    tokenizer: Tokenizer | TokenizerPair | None = None

    @property
    def opened(self) -> tuple[Path, Tokenizer | TokenizerPair]:
        """The directory of the pipeline, and its tokenizer; raises InputError for published shapes."""
        if self.pipeline is None or self.tokenizer is None:
            raise InputError("published shapes have no pipeline and no tokenizer: they are for a dry run")
        return self.pipeline, self.tokenizer

    @property
    def prompt_length(self) -> int:
        """The tokens of a prompt for the text encoders."""
        if self.tokenizer is not None:
            return self.tokenizer.max_length
        return self.text_encoder.config.max_position_embeddings

    def term_prompt_length(self, clip: str) -> int:
        """Returns the tokens of a prompt for a CLIP among `networks`."""
        part = self.networks[clip]
        if part.tokenizer is not None:
            return part.tokenizer.max_length
        return of_kind(part.config, CLIPConfig, clip).text_config.max_position_embeddings

    def term_tokenizer(self, clip: str) -> Tokenizer:
        """Returns the tokenizer of a CLIP among `networks`; raises InputError for a network that has none."""
        part = self.networks[clip]
        if part.tokenizer is None:
            raise InputError(f"{part.directory}, of which a term reads prompts, is no CLIP with a tokenizer")
        return part.tokenizer

    @property
    def text_encoders(self) -> dict[str, Part[CLIPTextConfig]]:
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
    teacher = _part(pipeline.component_dir("unet"), UNetConfig)
    if config.architecture:
        _require_architecture(config.architecture, teacher)
    student, student_schedule = teacher, pipeline.schedule_config
    if config.student.init != "teacher":
        student, student_schedule = _student(config.student.init, teacher.config, pipeline.schedule_config)
    towers = {name: _part(pipeline.component_dir(name), CLIPTextConfig) for name in pipeline.text_encoders}
    return Parts(
        teacher=teacher,
        teacher_schedule=pipeline.schedule_config,
        student=student,
        student_schedule=student_schedule,
        text_encoder=towers[TOWERS[0]],
        text_encoder_2=towers.get(TOWERS[1]),
        zero_null=pipeline.zero_null,
        vae=_part(pipeline.component_dir("vae"), AutoencoderConfig),
        networks={name: _network(source, pipeline) for name, source in _sources(config).items()},
        pipeline=pipeline.directory,
        tokenizer=pipeline.tokenizer,
    )


def latent_side(config: ConfigDict, parts: Parts) -> int:
    """Returns the height and width of the latents that a run trains with.

    Raises InputError for a resolution that the autoencoder or the teacher's UNet does not divide, and where
    neither the configuration nor that UNet says one.
    """
    unet, pixels = parts.teacher.config, parts.vae.config.downsampling
    if config.resolution % pixels:
        raise InputError(f"config.resolution = {config.resolution} is not a multiple of the VAE's {pixels}")
    side = config.resolution // pixels or unet.sample_size
    if side is None:
        raise InputError(f"{parts.teacher.directory} does not say its sample_size: set config.resolution")
    factor = 2 ** (len(unet.block_out_channels) - 1)
    if side % factor:
        raise InputError(f"config.resolution: latents of {side} x {side} are not a multiple of {factor}")
    return side


def describe_size(config: ConfigDict, parts: Parts) -> str | None:
    """Returns a line where a run trains at another size than the teacher's UNet was made for, and None elsewhere."""
    own, pixels = parts.teacher.config.sample_size, parts.vae.config.downsampling
    if own is None or latent_side(config, parts) == own:
        return None
    return f"config.resolution = {config.resolution}: the teacher's UNet was made for {own * pixels} px"


def _part(directory: Path, kind: type[C]) -> Part[C]:
    return Part(config=of_kind(check_component(directory), kind, str(directory)), directory=directory)


def _student(
    reference: str, teacher: UNetConfig, teacher_schedule: ScheduleConfig
) -> tuple[Part[UNetConfig], ScheduleConfig]:
    # A file's shapes say less than the teacher's configuration does, the number of heads above all.
    directory = directory_of(reference, like=teacher) if is_single_file(reference) else resolve(reference)
    directory = _export_of(directory) if is_run(directory) else directory
    part = _part(component_dir(directory, "unet"), UNetConfig)
    # A UNet on its own says nothing of its schedule: it must be the teacher's.
    return part, teacher_schedule if part.directory == directory else read_schedule(directory)


def _export_of(run: Path) -> Path:
    """Returns the student of a run, from which another starts: what the run exported."""
    if not (run / EXPORT).is_dir():
        raise InputError(
            f"config.student.init: {run} is a run without {EXPORT}/, which is written after its last step: wait "
            "for it, or name what convert.py to-diffusers writes of a checkpoint"
        )
    return run / EXPORT


def _sources(config: ConfigDict) -> dict[str, Source]:
    return needed_sources(config, term_classes(config))


def _network(source: Source, pipeline: PipelineParts) -> Part[ModelConfig]:
    if source.reference in ("vae", "vae_tiny"):
        return _part(pipeline.component_dir(source.reference), AutoencoderConfig)
    directory = component_dir(resolve(source.reference), source.folder)
    config = check_component(directory)
    if not isinstance(config, CLIPConfig):
        return Part(config=config, directory=directory)
    return Part(
        config=config,
        directory=directory,
        image=_clip_image(directory, config),
        tokenizer=_clip_tokenizer(directory, config, pipeline),
    )


def _published_network(source: Source, vae: Part[AutoencoderConfig]) -> Part[ModelConfig]:
    if source.field == "config.clip.model":
        clip = CLIPConfig.from_dict(published.CLIP_VIT_B32)
        return Part(config=clip, directory=None, image=CLIPImageConfig())
    if source.folder == "vae" or source.reference == "vae":
        return vae
    if source.folder == "vae_tiny":
        return Part(config=TinyVAEConfig.from_dict(published.TINY_VAE), directory=None)
    raise InputError(
        f"{source.field} = {source.reference!r} has no published shapes: a dry run needs its directory"
    )


def _clip_image(directory: Path, clip: CLIPConfig) -> CLIPImageConfig:
    """Reads how the CLIP takes its pictures; without a file of its own, as OpenAI's do, at its size."""
    size = clip.vision_config.image_size
    if not (directory / "preprocessor_config.json").exists():
        return CLIPImageConfig(size=size, crop_size=size)
    path = file_of(directory, "preprocessor_config.json")
    image = CLIPImageConfig.from_dict(read_json(path), str(path))
    if image.size != size:
        raise InputError(f"{path} has size={image.size}; the network takes {size}")
    return image


def _clip_tokenizer(directory: Path, clip: CLIPConfig, pipeline: PipelineParts) -> Tokenizer:
    """Reads the tokenizer of a term's CLIP: without files of its own, the pipeline's first one."""
    own = (directory / "tokenizer_config.json").is_file()
    return load_fitting(directory if own else pipeline.component_dir("tokenizer"), clip.text_config)


def _published_parts(config: ConfigDict) -> Parts:
    shapes = published.ARCHITECTURES.get(config.architecture)
    if shapes is None:
        raise InputError(
            f"config.architecture = {config.architecture!r} is none of {', '.join(published.ARCHITECTURES)}"
        )
    unet = Part(config=UNetConfig.from_dict(shapes["unet"]), directory=None)
    vae = Part(config=VAEConfig.from_dict(shapes["vae"]), directory=None)
    schedule = ScheduleConfig.from_dict(shapes["scheduler"])
    towers = {
        name: Part(config=CLIPTextConfig.from_dict(shapes[name]), directory=None)
        for name in TOWERS
        if name in shapes
    }
    return Parts(
        teacher=unet,
        teacher_schedule=schedule,
        student=unet,
        student_schedule=schedule,
        text_encoder=towers[TOWERS[0]],
        text_encoder_2=towers.get(TOWERS[1]),
        vae=vae,
        networks={name: _published_network(source, vae) for name, source in _sources(config).items()},
        pipeline=None,
    )


def _require_architecture(architecture: str, teacher: Part[UNetConfig]) -> None:
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
