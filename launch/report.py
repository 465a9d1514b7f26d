"""Writes the page of a run, report.html: samples, curves, settings against the paper's, checkpoints, machine.

python launch/report.py runs/openmoji
"""

from argparse import Namespace

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.fields import text

FLAGS = (
    Flag("run", "The directory of a run, which may be training.", path, text(), positional=True),
    Flag("out", "The file to write. Default: report.html in that directory.", path, text()),
)


def main(given: Namespace) -> None:
    from sbv2_jax.run.page import write_page

    print(write_page(given.run, given.out))


def command() -> None:
    """The command, as it is installed."""
    cli.run_flags(main, FLAGS, __doc__)


if __name__ == "__main__":
    command()
