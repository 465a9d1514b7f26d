"""Writes docs/configuration.md, the table of every configuration field, from the declarations of the fields.

python benchmarks/configuration_page.py --write=docs/configuration.md
"""

from argparse import Namespace
from pathlib import Path

from sbv2_jax import cli
from sbv2_jax.fields import as_table, text
from sbv2_jax.openmoji.pretrain import settings
from sbv2_jax.run import config_fields

PAGE = """# Configuration

Every field of `--config`, set on the command line with `--config.FIELD=VALUE` or in a file of `configs/`. A default is
what a config file starts from; the files say what they change. This page is written by
`python benchmarks/configuration_page.py --write=docs/configuration.md`, from where the fields are declared; the
`--help` of each command tells the same.

## A distillation: `launch/train.py`, `launch/compile.py`

Declared in [`sbv2_jax/run/config_fields.py`](../sbv2_jax/run/config_fields.py).

{run}

## A pre-training: `launch/pretrain.py`

Declared in [`sbv2_jax/openmoji/pretrain/settings.py`](../sbv2_jax/openmoji/pretrain/settings.py).

{pretraining}
"""


def page() -> str:
    """Returns the text of the page."""
    return PAGE.format(run=as_table(config_fields.FIELDS), pretraining=as_table(settings.FIELDS))


def main(given: Namespace) -> None:
    Path(given.write).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    cli.run_flags(
        main, (cli.Flag("write", "The .md file to write.", cli.path, text(), required=True),), __doc__
    )
