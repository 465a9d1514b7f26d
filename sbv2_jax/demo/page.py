"""The live page itself, in gradio: the picture follows as one types."""

from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from sbv2_jax.demo.studio import MOST_PICTURES, Studio
from sbv2_jax.errors import InputError

# No font, and nothing else, is asked of another machine.
_THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_STYLE = "img { image-rendering: pixelated } footer { display: none !important }"
_KEPT = (60, 600)  # seconds: how often pictures are deleted, and how old they then are; at the end all are
_LONGEST = 500  # characters of a prompt
_LARGEST_SEED = 2**32 - 1


def build(studio: Studio, *, prompt: str, teacher_steps: int, guidance: float) -> gr.Blocks:
    """Returns the page of a studio.

    Args:
      prompt: what it shows at first.
      teacher_steps, guidance: of the picture in many steps that is set beside.
    """
    with gr.Blocks(title="One step", analytics_enabled=False, delete_cache=_KEPT) as page:
        with gr.Tab("Type"):
            _typing(page, studio, prompt, teacher_steps, guidance)
        with gr.Tab("Between") as tab:
            _between(tab, studio, prompt)
        if studio.merges:
            with gr.Tab("Merge") as tab:
                _merge(tab, studio, prompt)
    return page


def serve(page: gr.Blocks, *, host: str, port: int | None) -> None:
    """Serves a page until it is interrupted; raises InputError for a host or port that cannot be listened on."""
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=_THEME,
            css=_STYLE,
            ssr_mode=False,
            enable_monitoring=False,
        )
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port or 'any'}: {error}") from error
    print(f"{address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _typing(page: gr.Blocks, studio: Studio, prompt: str, teacher_steps: int, guidance: float) -> None:
    with gr.Row():
        with gr.Column():
            text = _prompt("Prompt", prompt, "prompt")
            negative = _prompt("Not to be seen", "", "negative")
            model = gr.Dropdown(studio.names, value=studio.names[0], label="Model", elem_id="model")
            with gr.Row():
                seed = _seed("Seed", "seed")
                another = gr.Button("Another seed")
            count = gr.Radio([1, 4, MOST_PICTURES], value=1, label="Pictures")
            with gr.Accordion("In many steps beside it", open=False):
                beside = gr.Checkbox(False, label="Draw it", elem_id="beside")
                other = gr.Dropdown(studio.names, value=studio.names[-1], label="Model")
                steps = gr.Slider(2, 50, value=teacher_steps, step=1, label="Steps")
                strength = gr.Slider(1, 8, value=guidance, step=0.25, label="Guidance")
        with gr.Column():
            picture, note = _picture("One step", "picture")
        with gr.Column(visible=False) as column:
            many, many_note = _picture("Many steps", "many")

    def draw(model: str, text: str, negative: str, seed: float, count: int) -> tuple[Any, str]:
        return _shown(
            lambda: studio.pictures(
                model, text, seed=_whole(seed), count=int(count), negative_prompt=negative
            )
        )

    def draw_many(
        beside: bool,
        model: str,
        text: str,
        negative: str,
        seed: float,
        count: int,
        steps: float,
        scale: float,
    ) -> tuple[np.ndarray | None, str]:
        if not beside:
            return None, ""
        return _shown(
            lambda: studio.pictures(
                model,
                text,
                seed=_whole(seed),
                count=int(count),
                negative_prompt=negative,
                steps=int(steps),
                guidance=scale,
            )
        )

    common = [text, negative, seed, count]
    _live(
        [text.change, negative.change, seed.change, count.change, model.change, page.load],
        draw,
        [model, *common],
        [picture, note],
    )
    beside.change(lambda on: gr.Column(visible=on), beside, column, show_progress="hidden")
    # Many steps do not follow each letter.
    _live(
        [
            text.submit,
            text.blur,
            seed.change,
            count.change,
            beside.change,
            other.change,
            steps.release,
            strength.release,
        ],
        draw_many,
        [beside, other, *common, steps, strength],
        [many, many_note],
    )
    another.click(
        lambda: int(np.random.default_rng().integers(_LARGEST_SEED)), None, seed, show_progress="hidden"
    )


def _between(tab: gr.Tab, studio: Studio, prompt: str) -> None:
    with gr.Row():
        with gr.Column():
            first, second = _prompt("From", prompt, "from"), _prompt("To", prompt, "to")
            model = gr.Dropdown(studio.names, value=studio.names[0], label="Model")
            with gr.Row():
                seeds = _seed("Seed", "from_seed"), _seed("Other seed", "to_seed", 1)
            share = gr.Slider(0, 1, value=0.5, step=0.01, label="Prompt", elem_id="share")
            noise_share = gr.Slider(0, 1, value=0.0, step=0.01, label="Noise")
        with gr.Column():
            picture, note = _picture("Between", "way")

    def draw(
        model: str, first: str, second: str, seed: float, other: float, share: float, noise_share: float
    ) -> tuple[np.ndarray | None, str]:
        return _shown(
            lambda: studio.between(model, (first, second), (_whole(seed), _whole(other)), share, noise_share)
        )

    inputs = [model, first, second, *seeds, share, noise_share]
    _live(
        [tab.select, *(one.change for one in inputs)],
        draw,
        inputs,
        [picture, note],
    )


def _merge(tab: gr.Tab, studio: Studio, prompt: str) -> None:
    first, other = studio.merges
    with gr.Row():
        with gr.Column():
            text, seed = _prompt("Prompt", prompt, "merge_prompt"), _seed("Seed", "merge_seed")
            weight = gr.Slider(
                0, 1, value=0.5, step=0.01, label=f"Weight of {first}, the rest of {other}", elem_id="weight"
            )
        with gr.Column():
            picture, note = _picture("Merge", "merge")

    def draw(text: str, seed: float, weight: float) -> tuple[Any, str]:
        return _shown(lambda: studio.merged(text, weight, seed=_whole(seed)))

    _live([tab.select, text.change, seed.change, weight.change], draw, [text, seed, weight], [picture, note])


def _prompt(label: str, value: str, name: str) -> gr.Textbox:
    return gr.Textbox(value, label=label, max_length=_LONGEST, elem_id=name, autofocus=name == "prompt")


def _seed(label: str, name: str, value: int = 0) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=_LARGEST_SEED, elem_id=name)


def _picture(label: str, name: str) -> tuple[gr.Image, gr.Textbox]:
    picture = gr.Image(label=label, format="png", interactive=False, elem_id=name, buttons=["download"])
    return picture, gr.Textbox(show_label=False, interactive=False, container=False, elem_id=f"{name}_note")


def _live(triggers: list, call: Callable, inputs: list, outputs: list) -> None:
    """Calls at each trigger; what comes while a picture is drawn waits, and only the last of it is drawn."""
    gr.on(
        triggers,
        call,
        inputs,
        outputs,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )


def _whole(value: float | None) -> int:
    """Returns the number of a field; raises InputError for one that was emptied."""
    if value is None:
        raise InputError("a number is missing")
    return int(value)


def _shown(draw: Callable) -> tuple[np.ndarray | None, str]:
    """Returns a sheet and the time that it took, or nothing and what is wrong."""
    try:
        sheet, seconds, compiled = draw()
    except InputError as error:
        return None, str(error)
    if compiled:
        return sheet, f"{seconds:.1f} s, compiling included: the next is faster"
    return sheet, f"{1000 * seconds:.0f} ms"
