"""Converts checkpoints: out of a run into diffusers, to and from Orbax and LoRA files, and one with another.

python launch/convert.py to-diffusers --run=RUN --out=DIR [--step=N] [--which=student|ema|teacher] [--base=TEACHER]
    [--init=START] [--dtype=TYPE] [--push_to_hub=OWNER/NAME]
python launch/convert.py to-diffusers --model=ORBAX_DIR --out=DIR [--dtype=TYPE]
python launch/convert.py from-diffusers --model=DIR_OR_ID --out=ORBAX_DIR [--dtype=TYPE]
python launch/convert.py from-openclip --model=DIR_OR_ID --out=DIR [--weights=FILE]
python launch/convert.py from-inception --model=FILE.pth --out=DIR
python launch/convert.py from-single-file --model=FILE.safetensors --out=DIR [--base=DIR_OR_ID] [--dtype=TYPE]
    [--prediction_type=epsilon|v_prediction]
python launch/convert.py lora --run=RUN --out=FILE.safetensors [--step=N] [--which=student|ema|score]
    [--format=diffusers|kohya]
python launch/convert.py fuse --model=DIR --lora=FILE_OR_DIR_OR_ID[:STRENGTH] [--lora=...] --out=DIR [--alpha=A|rank]
    [--dtype=TYPE]
python launch/convert.py merge --model=DIR_OR_RUN --weight=0.5 --model=DIR_OR_RUN --weight=0.5 --out=DIR
    [--dtype=TYPE]
python launch/convert.py extract-lora --model=DIR --base=DIR --rank=R --out=FILE.safetensors
    [--format=diffusers|kohya]
python launch/convert.py inspect --model=DIR_OR_FILE [--other=DIR_OR_FILE]

Each command and its flags are declared in sbv2_jax/run/conversions.py.
"""

from sbv2_jax import cli
from sbv2_jax.run.conversions import COMMANDS


def command() -> None:
    """The command, as it is installed."""
    cli.run_commands(COMMANDS, __doc__)


if __name__ == "__main__":
    command()
