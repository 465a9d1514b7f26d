"""Shows a live page: the picture follows as one types. Needs pip install "sbv2_jax[demo]".

python launch/demo.py --model=runs/openmoji --model=bundled
"""

from argparse import Namespace

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.errors import InputError
from sbv2_jax.fields import number, text, whole

FLAGS = (
    Flag(
        "model",
        "A run, a diffusers directory, a hub id, or 'bundled'; several are offered. The first draws at the start, the "
        "last is what is set beside it in many steps. Default: bundled.",
        path,
        text(),
        several=True,
    ),
    Flag("merge", "Two models or runs, A,B, whose weighted sum is drawn live.", default=""),
    Flag("prompt", "What is shown at first.", default="a large red apple on a blue background"),
    Flag("steps", "Steps of the picture beside.", int, whole(2, 50), default=25),
    Flag("guidance", "Its guidance.", float, number(1, 8), default=2.0),
    Flag("host", "The address that is listened on; 0.0.0.0 lets other machines in.", default="127.0.0.1"),
    Flag("port", "The port. Default: the first free one from 7860.", int, whole(1, 65535)),
)


def main(given: Namespace) -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.demo.studio import Studio
    from sbv2_jax.devices.cache import use_cache

    try:
        from sbv2_jax.demo.page import build, serve
    except ImportError as error:
        raise InputError(f'the live page needs gradio: pip install "sbv2_jax[demo]" ({error})') from error
    use_cache()
    studio = Studio(given.model or ["bundled"], given.merge)
    page = build(studio, prompt=given.prompt, teacher_steps=given.steps, guidance=given.guidance)
    serve(page, host=given.host, port=given.port)


def command() -> None:
    """The command, as it is installed."""
    cli.run_flags(main, FLAGS, __doc__)


if __name__ == "__main__":
    command()
