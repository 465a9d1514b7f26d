"""Converts checkpoints: out of a run into diffusers, to and from Orbax and LoRA files, and one with another.

python launch/convert.py to-diffusers --run=RUN --out=DIR [--step=N] [--which=student|ema|teacher] [--base=TEACHER]
    [--init=START] [--dtype=TYPE] [--push_to_hub=OWNER/NAME]
python launch/convert.py to-diffusers --model=ORBAX_DIR --out=DIR [--dtype=TYPE]
python launch/convert.py from-diffusers --model=DIR_OR_ID --out=ORBAX_DIR [--dtype=TYPE]
python launch/convert.py from-openclip --model=DIR_OR_ID --out=DIR
python launch/convert.py lora --run=RUN --out=FILE.safetensors [--step=N] [--which=student|ema|score]
python launch/convert.py fuse --model=DIR --lora=FILE.safetensors --out=DIR [--alpha=A] [--dtype=TYPE]
python launch/convert.py merge --model=DIR_OR_RUN --weight=0.5 --model=DIR_OR_RUN --weight=0.5 --out=DIR
    [--dtype=TYPE]
python launch/convert.py extract-lora --model=DIR --base=DIR --rank=R --out=FILE.safetensors
python launch/convert.py inspect --model=DIR_OR_FILE [--other=DIR_OR_FILE]
"""

from absl import flags

from sbv2_jax import cli
from sbv2_jax.errors import InputError

_RUN = flags.DEFINE_string("run", None, "The directory of a run of launch/train.py.")
_STEP = flags.DEFINE_integer("step", None, "A step of the run; without it the newest that verifies.")
_WHICH = flags.DEFINE_enum("which", None, ("student", "ema", "teacher", "score"), "What of the run to take.")
_MODEL = flags.DEFINE_multi_string(
    "model", None, "A pipeline or UNet directory, a run, or a hub id; merge: several."
)
_BASE = flags.DEFINE_string("base", None, "The teacher, where it moved; what a LoRA is extracted against.")
_INIT = flags.DEFINE_string("init", None, "What the run's student started from, where it moved.")
_OTHER = flags.DEFINE_string("other", None, "A second model to compare with.")
_WEIGHT = flags.DEFINE_multi_float("weight", None, "The weight of each model of a merge; they sum to 1.")
_LORA = flags.DEFINE_string("lora", None, "A LoRA file to fuse.")
_ALPHA = flags.DEFINE_float("alpha", None, "The alpha of a LoRA file that does not say it.")
_RANK = flags.DEFINE_integer("rank", None, "The rank of the extracted LoRA.", lower_bound=1)
_PUSH = flags.DEFINE_string("push_to_hub", None, "OWNER/NAME to upload the result to, with a model card.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ("float32", "bfloat16", "float16"), "The type of the weights; a pipeline's is float32."
)
_OUT = flags.DEFINE_string("out", None, "The directory or file to write; nothing is overwritten.")

# The flags that each command needs, and those that it may have.
_COMMANDS = {
    "to-diffusers": (("run", "out"), ("step", "which", "base", "init", "push_to_hub", "dtype")),
    "to-diffusers --model": (("model", "out"), ("dtype",)),
    "from-diffusers": (("model", "out"), ("dtype",)),
    "from-openclip": (("model", "out"), ()),
    "lora": (("run", "out"), ("step", "which")),
    "fuse": (("model", "lora", "out"), ("alpha", "dtype")),
    "merge": (("model", "weight", "out"), ("dtype",)),
    "extract-lora": (("model", "base", "rank", "out"), ()),
    "inspect": (("model",), ("other",)),
}


def main(command: str) -> None:
    cli.check_command(command, _COMMANDS)
    if command != "merge" and len(_MODEL.value or []) > 1:
        raise InputError(f"{command} takes one --model")
    # jax is loaded only once the flags are right
    from sbv2_jax.convert import inspection as listing
    from sbv2_jax.convert import layouts, merge, openclip
    from sbv2_jax.convert.lora import extract, fuse
    from sbv2_jax.run import export, hub
    from sbv2_jax.run.trained import open_model

    model = _MODEL.value[0] if _MODEL.value else None
    if command == "from-diffusers" or command == "to-diffusers" and model:
        layouts.rewrite(model, _OUT.value, orbax=command == "from-diffusers", dtype=_DTYPE.value)
    elif command == "from-openclip":
        openclip.convert(model, _OUT.value)
    elif command == "to-diffusers":
        if _PUSH.value is not None:
            hub.check_repository(_PUSH.value, _WHICH.value)
        step = export.export_checkpoint(
            _RUN.value,
            _OUT.value,
            step=_STEP.value,
            which=_WHICH.value,
            base=_BASE.value,
            init=_INIT.value,
            dtype=_DTYPE.value,
        )
        print(f"wrote {_OUT.value} from step {step}")
        if _PUSH.value is not None:
            hub.write_card(
                _OUT.value, _PUSH.value, _RUN.value, step=step, which=_WHICH.value, base=_BASE.value
            )
            print(f"uploaded {hub.push(_OUT.value, _PUSH.value)}")
    elif command == "lora":
        step = export.export_lora(_RUN.value, _OUT.value, step=_STEP.value, which=_WHICH.value)
        print(f"wrote {_OUT.value} from step {step}")
    elif command == "fuse":
        fuse.fuse_file(open_model(model), _LORA.value, _OUT.value, _ALPHA.value, dtype=_DTYPE.value)
    elif command == "merge":
        models = [open_model(one) for one in _MODEL.value]
        merge.merge_models(models, _WEIGHT.value, _OUT.value, dtype=_DTYPE.value)
    elif command == "extract-lora":
        base = open_model(_BASE.value)
        print(extract.summary(extract.extract_file(open_model(model), base, _RANK.value, _OUT.value)))
    else:
        for line in listing.report(model, _OTHER.value):
            print(line)


if __name__ == "__main__":
    cli.run(main, commands=[name for name in _COMMANDS if " " not in name])
