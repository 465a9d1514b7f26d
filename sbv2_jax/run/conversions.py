"""The subcommands of `launch/convert.py`: the flags of each, and what it calls.

jax is imported inside of each: only once the flags are right.
"""

from argparse import Namespace

from sbv2_jax.cli import Command, Flag, path, require
from sbv2_jax.errors import InputError
from sbv2_jax.fields import number, one_of, text, whole

_MODEL = Flag("model", "A pipeline or UNet directory, a run, or a hub id.", path, text(), required=True)
_RUN = Flag("run", "The directory of a run of launch/train.py.", path, text(), required=True)
_STEP = Flag("step", "A step of the run; without it the newest that verifies.", int, whole(0))
_DTYPE = Flag(
    "dtype",
    "The type of the weights; a pipeline's is float32.",
    check=one_of("float32", "bfloat16", "float16"),
)
_FORMAT = Flag(
    "format",
    'The names of a LoRA file: "diffusers", for PEFT too, or "kohya", for ComfyUI, A1111 and Forge.',
    check=one_of("diffusers", "kohya"),
    default="diffusers",
)
_OUT = Flag("out", "The directory or file to write; nothing is overwritten.", path, text(), required=True)


def to_diffusers(given: Namespace) -> None:
    """Writes a diffusers directory: a student or the teacher of a run (--run), or an Orbax directory (--model)."""
    options = ("run", "step", "which", "base", "init", "push_to_hub")
    if given.model is not None:
        if stray := [f"--{name}" for name in options if getattr(given, name) is not None]:
            raise InputError(f"to-diffusers --model does not take {', '.join(stray)}")
        require(given, ("out",), "to-diffusers --model")
        from sbv2_jax.convert import layouts

        return layouts.rewrite(given.model, given.out, orbax=False, dtype=given.dtype)
    require(given, ("run", "out"), "to-diffusers")
    from sbv2_jax.run import export, hub

    if given.push_to_hub is not None:
        hub.check_repository(given.push_to_hub, given.which)
    step = export.export_checkpoint(
        given.run,
        given.out,
        step=given.step,
        which=given.which,
        base=given.base,
        init=given.init,
        dtype=given.dtype,
    )
    print(f"wrote {given.out} from step {step}")
    if given.push_to_hub is not None:
        hub.write_card(given.out, given.push_to_hub, given.run, step=step, which=given.which, base=given.base)
        print(f"uploaded {hub.push(given.out, given.push_to_hub)}")


def from_diffusers(given: Namespace) -> None:
    """Writes the weights of a diffusers directory as Orbax checkpoints, with a SHA-256 for every array."""
    from sbv2_jax.convert import layouts

    layouts.rewrite(given.model, given.out, orbax=True, dtype=given.dtype)


def from_openclip(given: Namespace) -> None:
    """Writes a CLIP that OpenCLIP published as one of transformers."""
    from sbv2_jax.convert import openclip

    openclip.convert(given.model, given.out, weights=given.weights)


def from_inception(given: Namespace) -> None:
    """Writes the Inception of FID that pytorch-fid publishes as a directory; its pickle is not run."""
    from sbv2_jax.convert import inception

    inception.convert(given.model, given.out)


def from_single_file(given: Namespace) -> None:
    """Writes a checkpoint in one file, in the original names of SD 1.x, 2.x or XL, as a diffusers directory."""
    from sbv2_jax.convert.formats.resolve import resolve
    from sbv2_jax.convert.formats.single_file import convert

    convert(
        given.model,
        given.out,
        base=given.base and resolve(given.base),
        prediction_type=given.prediction_type,
        dtype=given.dtype or "float32",
    )


def lora(given: Namespace) -> None:
    """Writes the LoRA of a run, of its student or of its score model, as a file."""
    from sbv2_jax.run import export

    step = export.export_lora(
        given.run, given.out, step=given.step, which=given.which, file_format=given.format
    )
    print(f"wrote {given.out} from step {step}")


def fuse(given: Namespace) -> None:
    """Adds LoRAs to the weights of a model, in float32."""
    from sbv2_jax.convert.lora.fuse import fuse_file
    from sbv2_jax.run.trained import open_run_or_model

    fuse_file(open_run_or_model(given.model), given.lora, given.out, given.alpha, dtype=given.dtype)


def merge(given: Namespace) -> None:
    """Writes the weighted sum of several models: SwiftBrush v2's join of its two trainings."""
    from sbv2_jax.convert.merge import merge_models
    from sbv2_jax.run.trained import open_run_or_model

    merge_models([open_run_or_model(one) for one in given.model], given.weight, given.out, dtype=given.dtype)


def extract_lora(given: Namespace) -> None:
    """Writes the LoRA file that comes nearest to the difference of two models."""
    from sbv2_jax.convert.lora.extract import extract_file, summary
    from sbv2_jax.run.trained import open_run_or_model

    model, base = open_run_or_model(given.model), open_run_or_model(given.base)
    print(summary(extract_file(model, base, given.rank, given.out, file_format=given.format)))


def inspect(given: Namespace) -> None:
    """Lists the tensors of a model with their SHA-256, or what differs from another one."""
    from sbv2_jax.convert.inspection import report

    for line in report(given.model, given.other):
        print(line)


COMMANDS = {
    "to-diffusers": Command(
        (
            _RUN._replace(required=False),
            _MODEL._replace(help="An Orbax directory, in place of a run.", required=False),
            _OUT._replace(required=False),
            _STEP,
            Flag(
                "which",
                'What to write: "student", "ema" (its average; the default of a run that keeps one) or "teacher".',
                check=one_of("student", "ema", "teacher"),
            ),
            Flag("base", "The run's teacher, where it moved.", path, text()),
            Flag("init", "What the run's student started from, where it moved.", path, text()),
            _DTYPE,
            Flag("push_to_hub", "OWNER/NAME to upload the result to, with a model card."),
        ),
        to_diffusers,
    ),
    "from-diffusers": Command((_MODEL, _OUT, _DTYPE), from_diffusers),
    "from-openclip": Command(
        (
            _MODEL._replace(help="A directory or hub id with an open_clip_config.json."),
            _OUT,
            Flag(
                "weights",
                "A file of other weights for it, .safetensors or of torch.save, as HPSv2 is.",
                path,
                text(),
            ),
        ),
        from_openclip,
    ),
    "from-inception": Command(
        (_MODEL._replace(help="pt_inception-2015-12-05-6726825d.pth."), _OUT), from_inception
    ),
    "from-single-file": Command(
        (
            _MODEL._replace(help="A .safetensors file."),
            _OUT,
            Flag(
                "base", "The pipeline, of the same shapes, that gives tokenizer and scheduler.", path, text()
            ),
            Flag(
                "prediction_type",
                "What its network predicts, where the file does not say (Stable Diffusion 2).",
                check=one_of("epsilon", "v_prediction"),
            ),
            _DTYPE,
        ),
        from_single_file,
    ),
    "lora": Command(
        (
            _RUN,
            _OUT,
            _STEP,
            Flag(
                "which",
                'What to write: "student", "ema" (its average; the default of a run that keeps one) or "score".',
                check=one_of("student", "ema", "score"),
            ),
            _FORMAT,
        ),
        lora,
    ),
    "fuse": Command(
        (
            _MODEL,
            Flag(
                "lora",
                "A LoRA: a file, a folder or a hub id; SOURCE:0.7 adds it at this strength. Given several times.",
                path,
                text(),
                required=True,
                several=True,
            ),
            _OUT,
            Flag("alpha", 'The alpha of a LoRA that does not say it, or "rank" for that of each layer.'),
            _DTYPE,
        ),
        fuse,
    ),
    "merge": Command(
        (
            _MODEL._replace(help=f"{_MODEL.help} Given several times.", several=True),
            Flag(
                "weight",
                "The weight of each model, in their order; they sum to 1.",
                float,
                number(),
                required=True,
                several=True,
            ),
            _OUT,
            _DTYPE,
        ),
        merge,
    ),
    "extract-lora": Command(
        (
            _MODEL,
            Flag("base", "The model that the LoRA will be for.", path, text(), required=True),
            Flag("rank", "The rank of the LoRA.", int, whole(1), required=True),
            _OUT,
            _FORMAT,
        ),
        extract_lora,
    ),
    "inspect": Command(
        (
            _MODEL._replace(help="A pipeline or UNet directory, a hub id, or a .safetensors file."),
            Flag("other", "A second one to compare with.", path, text()),
        ),
        inspect,
    ),
}
