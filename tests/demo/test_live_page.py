"""The live page in a real browser: one types, the picture follows, and no other machine is asked for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import needs_browser, opened
from train_processes import free_port

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, needs_browser]

ROOT = Path(__file__).parents[2]
HOSTILE = (
    '<script>document.title = "taken"</script><img src=x onerror="document.title = `taken`"> ' + "x" * 5000
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    port = free_port()
    command = [
        sys.executable,
        "launch/demo.py",
        "--model=bundled",
        "--merge=bundled,bundled",
        f"--port={port}",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("pictures")),
    }
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    yield line.split()[0]
    process.terminate()
    process.wait(60)


@pytest.fixture
def page(address):
    with opened(address) as page:
        page.wait_for_selector("#picture img", timeout=120_000)
        yield page


def field(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


def seen(page, name, before):
    """Waits for another picture than the one of this address, and returns the new one's."""
    script = "([name, before]) => { const it = document.querySelector(`#${name} img`); return it && it.src != before }"
    page.wait_for_function(script, arg=[name, before], timeout=120_000)
    return page.get_attribute(f"#{name} img", "src")


def test_the_picture_follows_what_is_typed(page):
    first = page.get_attribute("#picture img", "src")
    field(page, "prompt").press_sequentially(" and")
    second = seen(page, "picture", first)
    field(page, "prompt").fill("a large grinning face on a green background")
    third = seen(page, "picture", second)
    field(page, "negative").fill("a green background")
    fourth = seen(page, "picture", third)
    page.get_by_role("button", name="Another seed").click()
    seen(page, "picture", fourth)
    assert re.fullmatch(r"\d+ ms", field(page, "picture_note").input_value())


def test_the_other_tabs_draw_as_soon_as_they_are_opened(page):
    page.get_by_role("tab", name="Between").click()
    first = seen(page, "way", None)
    field(page, "to").fill("a large grinning face on a green background")
    seen(page, "way", first)
    page.get_by_role("tab", name="Merge").click()
    first = seen(page, "merge", None)
    field(page, "merge_prompt").fill("a large eye on a red background")
    seen(page, "merge", first)


def test_empty_long_and_hostile_input_does_nothing_bad(page):
    field(page, "prompt").fill(" ")
    page.wait_for_function(
        "document.querySelector('#picture_note textarea, #picture_note input').value.includes('empty')"
    )
    field(page, "prompt").fill(HOSTILE)
    seen(page, "picture", None)
    assert page.title() == "One step" and len(field(page, "prompt").input_value()) <= 5000
    field(page, "prompt").fill("a large red apple")
    page.wait_for_timeout(500)
    field(page, "seed").fill("")
    page.wait_for_timeout(500)
    field(page, "seed").fill("7")
    seen(page, "picture", None)


def test_many_steps_stand_beside_where_they_are_asked_for(page):
    page.get_by_text("In many steps beside it").click()
    page.get_by_label("Draw it").check()
    first = seen(page, "many", None)
    assert re.fullmatch(r"\d+\.\d s, compiling included: .*", field(page, "many_note").input_value())
    field(page, "seed").fill("5")
    seen(page, "many", first)
    assert re.fullmatch(r"\d+ ms", field(page, "many_note").input_value())


def test_a_port_that_is_taken_is_one_line(address):
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "launch/demo.py", "--model=bundled", f"--port={port}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")
