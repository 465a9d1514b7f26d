"""The model card of a run, and its upload by the hub's own client to a server on this machine."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from made_run import STEP, Made, command, make_run
from PIL import Image
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.errors import InputError
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.run import hub
from sbv2_jax.run.export import export_checkpoint

pytestmark = pytest.mark.slow

METRICS = [{"step": step, "loss/vsd": 0.125 * step, "images_per_sec": None} for step in range(1, STEP + 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Made:
    world = tmp_path_factory.mktemp("world")
    write_pipeline(world)
    made = make_run(world, "run", **{"sample.prompts": ('a "red" apple', "a dog")})
    lines = [json.dumps(values) for values in METRICS] + ['{"step": 7, "lo']
    (made.directory / "metrics.jsonl").write_text("\n".join(lines))
    for step in (0, STEP - 1, STEP + 2):
        picture = np.full((4, 4, 3), step, np.uint8)
        save_png(made.directory / "samples" / f"step_{step:06d}.png", picture)
    return made


def test_the_card_tells_the_run_its_last_metrics_and_shows_its_pictures(run, tmp_path):
    out = tmp_path / "out"
    step = export_checkpoint(run.directory, out)
    hub.write_card(out, "me/apples", run.directory, step=step)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None, "a directory of the author's is no model of the hub"
    text = card.text
    assert "# apples" in text and f"the averaged student at step {STEP}" in text
    assert 'from_pretrained("me/apples")' in text and "pipe(\"a 'red' apple\"" in text
    assert "| loss/vsd | 0.5 |" in text and f"| step | {STEP} |" in text and "images_per_sec" not in text
    assert "![Teacher and student, the same prompts and noise](samples.png)" in text
    assert np.asarray(Image.open(out / "samples.png"))[0, 0, 0] == STEP - 1, "not that of a later step"
    config = json.loads(re.search("```json\n(.*?)```", text, re.DOTALL)[1])
    assert config["teacher"] == "pipeline" and config["vsd.guidance"] == 4.5
    assert config["student.lora.targets"] == r".*\.attn[12]\.to_(q|k|v|out\.0)"
    assert str(run.directory.parent) not in text
    assert sbv2_jax.load(out).latent_shape == (8, 8, 4), "the card is not in the way"


def test_a_card_of_a_bare_run_from_the_hub(run, tmp_path, monkeypatch):
    export_checkpoint(run.directory, tmp_path / "out", which="student")
    exported = {path.name for path in (tmp_path / "out").iterdir()}
    (run.directory / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (run.directory / "samples").rename(tmp_path / "samples")
    try:
        monkeypatch.chdir(tmp_path)
        common = {"step": STEP, "which": "student", "base": "owner/teacher@v2"}
        hub.write_card(tmp_path / "out", "me/apples", run.directory, **common)
    finally:
        (tmp_path / "metrics.jsonl").rename(run.directory / "metrics.jsonl")
        (tmp_path / "samples").rename(run.directory / "samples")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "owner/teacher" and f": the student at step {STEP}" in card.text
    assert "metrics" not in card.text and "samples.png" not in card.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == exported | {"README.md"}


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload, answered as the hub does for files that need no LFS; keeps what it was sent."""

    repositories: list[dict]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer secret"
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/apples", "name": "me/apples", "id": "1"})
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **mode} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitUrl": f"{self.server.url}/me/apples/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/apples", "sha": "0" * 40, "siblings": []})

    def answer(self, values: dict) -> None:
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    Hub.repositories, Hub.files = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_whole_directory_arrives(run, tmp_path, server):
    out = tmp_path / "out"
    hub.write_card(out, "me/apples", run.directory, step=export_checkpoint(run.directory, out))
    address = hub.push(out, "me/apples", HfApi(endpoint=server.url, token="secret"))
    assert address == f"{server.url}/me/apples"
    (repository,) = Hub.repositories
    assert (repository["organization"], repository["name"]) == ("me", "apples")
    want = {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    assert Hub.files == want and "unet/diffusion_pytorch_model.safetensors" in want and "README.md" in want


def test_what_fails_is_one_line_and_the_export_stays(run, tmp_path):
    out = tmp_path / "out"
    code, printed, err = command(
        "to-diffusers", f"--run={run.directory}", f"--out={out}", "--push_to_hub=me/apples"
    )
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(f"error: {out} is written, but could not be uploaded to me/apples: ")
    assert printed == f"wrote {out} from step {STEP}\n"
    assert (out / "README.md").exists() and (out / "unet").is_dir()


@pytest.mark.parametrize(
    ("repository", "which", "message"),
    [
        ("apples", None, "apples is not OWNER/NAME"),
        ("me/my apples", None, "--push_to_hub=me/my apples: "),
        ("a/b/c", "ema", "--push_to_hub=a/b/c: "),
        ("me/apples", "teacher", "takes a student, not --which=teacher"),
    ],
)
def test_a_name_is_checked_before_anything_is_written(repository, which, message):
    with pytest.raises(InputError, match=message):
        hub.check_repository(repository, which)
