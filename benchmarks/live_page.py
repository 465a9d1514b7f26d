"""Times the live page in a real browser, from a key that is pressed to the picture that it makes, and shows it.

pip install -e ".[demo]" playwright
python benchmarks/live_page.py --model=runs/openmoji --model=bundled --out=runs/page

A line of JSON; `page.png`, with a teacher of many steps beside it, and `narrow.png`, as a phone shows it, in --out.
Chromium is looked for where the system has it.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from string import ascii_lowercase

from absl import flags
from playwright.sync_api import Page, sync_playwright
from side_by_side import spread

from sbv2_jax import cli
from sbv2_jax.errors import InputError

_MODEL = flags.DEFINE_multi_string(
    "model", ["bundled"], "As for launch/demo.py: the first is drawn in one step."
)
_OUT = cli.define_path("out", "The folder of the screenshots.")
_KEYS = flags.DEFINE_integer("keys", 40, "Keys that are timed.", lower_bound=5)
_PORT = flags.DEFINE_integer("port", 7871, "Where the page is served meanwhile.")
_WARM, _WIDE, _NARROW = 10, {"width": 1280, "height": 720}, {"width": 390, "height": 900}
_PROMPT = "a large red apple on a blue background"
_PATIENCE = 30_000
# Milliseconds until the picture of another address is decoded, by the browser's clock; null where there is none.
_UNTIL_SEEN = """([text, patience]) => new Promise(done => {
  const box = document.querySelector("#prompt textarea"), before = document.querySelector("#picture img").src;
  const seen = async () => {
    const picture = document.querySelector("#picture img");
    if (!picture || picture.src == before) return;
    watch.disconnect();
    await picture.decode();
    done(performance.now() - begin);
  };
  const watch = new MutationObserver(seen);
  watch.observe(document.querySelector("#picture"), {subtree: true, childList: true, attributes: true});
  const begin = performance.now();
  setTimeout(() => done(null), patience);
  box.value = text;
  box.dispatchEvent(new Event("input", {bubbles: true}));
})"""

_BOTH_DRAWN = """() => ["#picture_note", "#many_note"].every(note =>
  /^\\d+ ms$/.test(document.querySelector(`${note} textarea, ${note} input`).value))"""


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise InputError("no Chromium is installed")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "launch/demo.py", *(f"--model={one}" for one in _MODEL.value)]
    process = subprocess.Popen([*command, f"--port={_PORT.value}"], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()
        if not address:
            raise InputError("launch/demo.py has ended; what it said is above")
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
                viewport=_WIDE
            )
            page.goto(address[0])
            page.wait_for_selector("#picture img", timeout=120_000)
            seconds = [_of_a_key(page, number) for number in range(_WARM + _KEYS.value)][_WARM:]
            print(
                json.dumps(
                    {"figure": "from a key to its picture", "model": _MODEL.value[0], **spread(seconds)}
                )
            )
            _take_pictures(page, out)
    finally:
        process.terminate()
        process.wait(60)


def _of_a_key(page: Page, number: int) -> float:
    """Returns the seconds until the picture of another letter is there; each key waits for the one before.

    The prompt stays as long as it is: letters past its last token would leave the picture, and its address, as it was.
    """
    milliseconds = page.evaluate(_UNTIL_SEEN, [f"{_PROMPT} {ascii_lowercase[number % 26]}", _PATIENCE])
    if milliseconds is None:
        raise InputError(f"no other picture came within {_PATIENCE // 1000} s of a key")
    time.sleep(0.2)
    return milliseconds / 1000


def _take_pictures(page: Page, out: Path) -> None:
    prompt = page.locator("#prompt textarea")
    page.get_by_label("4", exact=True).check()
    page.get_by_text("In many steps beside it").click()
    page.get_by_label("Draw it").check()
    page.wait_for_selector("#many img", timeout=180_000)
    # What has compiled tells no time: the one after it does.
    prompt.fill(_PROMPT)
    prompt.press("Enter")
    page.wait_for_function(_BOTH_DRAWN, timeout=180_000)
    page.screenshot(path=out / "page.png")
    page.set_viewport_size(_NARROW)
    page.wait_for_timeout(1000)
    page.screenshot(path=out / "narrow.png", full_page=True)


if __name__ == "__main__":
    cli.run(main, required=("out",))
