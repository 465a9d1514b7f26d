"""Publishing a student: a model card written from its run, and the upload to the hub."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from ml_collections import ConfigDict

from sbv2_jax.checkpoint.manifest import flatten
from sbv2_jax.convert.formats.files import read_json
from sbv2_jax.convert.formats.pipeline import component_dir, diffusers_arguments
from sbv2_jax.convert.formats.resolve import is_hub_id
from sbv2_jax.errors import InputError
from sbv2_jax.run.directory import METRICS, json_lines, sample_pictures
from sbv2_jax.run.trained import kept_student, read_run

PICTURE = "samples.png"
_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- {steps}-step
- swiftbrush
- sbv2_jax
---

# {name}

A {steps}-step text-to-image generator, distilled from {teacher} with sbv2_jax by the method of *SwiftBrush v2* (Dao et
al., 2024): {weights} at step {step}. {calls}.

```python
pipe = diffusers.DiffusionPipeline.from_pretrained("{repository}")
pipe("{prompt}", {arguments}).images[0]
```

```python
sbv2_jax.load("{repository}")("{prompt}")  # in JAX
```
{picture}{metrics}
## Configuration

```json
{config}
```
"""


def check_repository(repository: str, which: str | None) -> None:
    """Raises InputError where a name is not OWNER/NAME, and for what is not the run's own to publish."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub={repository}: {error}") from error
    if "/" not in repository:
        raise InputError(f"--push_to_hub={repository} is not OWNER/NAME")
    if which == "teacher":
        raise InputError("--push_to_hub takes a student, not --which=teacher")


def write_card(
    directory: str | Path,
    repository: str,
    run: str | Path,
    *,
    step: int,
    which: str | None = None,
    base: str | None = None,
) -> None:
    """Writes `README.md`, and the run's last grid of pictures, beside a student that was exported.

    Args:
      directory: the export.
      repository: OWNER/NAME that it will have.
      run, step, which, base: what was exported, as for `export_checkpoint`.

    Of local paths only the last part is told. Raises InputError as `read_run` does.
    """
    directory, run = Path(directory), Path(run)
    _, _, config = read_run(run, step, "step")
    if base is not None:
        config.teacher = base
    picture = _last_picture(run, step)
    if picture is not None:
        shutil.copyfile(picture, directory / PICTURE)
    arguments = diffusers_arguments(
        read_json(component_dir(directory, "scheduler") / "scheduler_config.json")
    )
    which = which or kept_student(config)
    text = _card(repository, config, step, which, arguments, _last_metrics(run, step), picture)
    (directory / "README.md").write_text(text, encoding="utf-8")


def push(directory: str | Path, repository: str, api: HfApi | None = None) -> str:
    """Uploads a directory as a repository of the hub, which is made if it does not exist; returns its address.

    The account is the one that `hf auth login` or `HF_TOKEN` gave. Raises InputError of one line for what goes
    wrong; the directory stays as it is.
    """
    api = api or HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(directory), commit_message="Upload a student of sbv2_jax"
        )
    except Exception as error:  # noqa: BLE001 (the hub's client raises its own, the HTTP client's, the system's)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{directory} is written, but could not be uploaded to {repository}: {reason[:300]}"
        ) from error
    return str(url)


def _card(
    repository: str,
    config: ConfigDict,
    step: int,
    which: str,
    arguments: str,
    metrics: Mapping[str, float],
    picture: Path | None,
) -> str:
    teacher = _public(config.teacher)
    prompts = config.sample.prompts if "sample" in config else ()
    count = len(config.student.get("timesteps", ())) or 1
    lines = [f"| {name} | {value:.4g} |" for name, value in metrics.items() if value is not None]
    return _CARD.format(
        base_model=f"base_model: {teacher.partition('@')[0]}\n" if is_hub_id(config.teacher) else "",
        name=repository.split("/")[1],
        repository=repository,
        teacher=teacher,
        weights="the averaged student" if which == "ema" else "the student",
        steps="one" if count == 1 else count,
        calls="One call of the UNet makes a picture"
        if count == 1
        else f"{count} calls of the UNet make a picture",
        arguments=arguments,
        step=step,
        prompt=(prompts[0] if prompts else "a red apple").replace('"', "'"),
        picture=f"\n![Teacher and student, the same prompts and noise]({PICTURE})\n" if picture else "",
        metrics="\n".join(["", "## Last metrics", "", "| metric | value |", "|---|---|", *lines, ""])
        if lines
        else "",
        config=json.dumps(
            {name: _public(value) for name, value in flatten(config.to_dict()).items()}, indent=1
        ),
    )


def _public(value: Any) -> Any:
    """Returns a value of the configuration without the directories in which the author's files lie."""
    if isinstance(value, str) and (os.sep in value or value.startswith("~")) and not is_hub_id(value):
        # regular expressions hold no slash, prompts are lists
        return Path(value).name
    return value


def _last_metrics(run: Path, step: int) -> dict[str, float]:
    """Returns the last line of the run's metrics that is not newer than the step; {} without the file."""
    lines = [line for line in json_lines(run / METRICS) if line["step"] <= step]
    return lines[-1] if lines else {}


def _last_picture(run: Path, step: int) -> Path | None:
    """Returns the run's last grid of pictures that is not newer than the step, but for that of step 0."""
    found = [path for number, path in sample_pictures(run).items() if 0 < number <= step]
    return found[-1] if found else None
