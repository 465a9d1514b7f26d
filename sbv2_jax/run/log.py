"""The record of a run: metrics.jsonl with each step exactly once, TensorBoard events, a progress bar, and a mirror."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from absl import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm.auto import tqdm

from sbv2_jax.errors import InputError
from sbv2_jax.run.directory import METRICS

_FLUSH_SECONDS = 120.0  # between writes of the TensorBoard events that are buffered


class Mirror(Protocol):
    """What is told every step too, such as a `WandbMirror`."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes the metrics of every step; silent on all processes but the first.

    Args:
      workdir: the run's directory; gets `metrics.jsonl` and `tensorboard/`.
      steps: the last step of the run, for the progress bar.
      batch_size: images of one step, for `images_per_sec`.
      resume_step: the step that was restored; what was logged beyond it is cut off. 0 starts anew.
      mirror: makes what is told every step too, when the files are there.

    Raises InputError where its files cannot be written, at any time: a disk fills up in the middle of a run.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        steps: int,
        batch_size: int,
        resume_step: int = 0,
        mirror: Callable[[], Mirror] | None = None,
    ):
        self._batch_size = batch_size
        self._last = (resume_step, time.monotonic())
        self._file = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / METRICS
        self._directory = path.parent
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_after(path, resume_step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
            board = path.parent / "tensorboard"
            board.mkdir(exist_ok=True)
            # Not an EventFileWriter: its thread dies of a full disk, and the run would not hear of it.
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            self._events, self._flushed = RecordWriter(open(board / name, "ab")), time.monotonic()  # noqa: SIM115
            self._add(0, file_version="brain.Event:2")
            # TensorBoard drops what an interrupted run logged from this step on.
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        self._mirror = mirror() if mirror else None
        # Into a file or a pipe, a line twice a minute is enough.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=steps, initial=resume_step, unit="step", mininterval=interval)

    def write(self, step: int, metrics: Mapping[str, Any], end: float | None = None) -> None:
        """Records the scalars of one step, with `images_per_sec` since the step recorded before.

        `end` is when the step ended, by `time.monotonic`, if not just now. A value that is not finite is null in the
        JSON, which has no NaN.
        """
        if self._file is None:
            return
        last_step, last_time = self._last
        now = time.monotonic() if end is None else end
        self._last = (step, now)
        values = {name: float(value) for name, value in metrics.items()}
        values["images_per_sec"] = self._batch_size * (step - last_step) / max(now - last_time, 1e-9)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        try:
            self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
            self._file.flush()
            self._add(step, summary=Summary(value=scalars))
            if now - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = now
        except OSError as error:
            raise self._unwritable(error) from error
        if self._mirror:
            self._mirror.write(step, values)
        losses = {name[5:]: f"{value:.3g}" for name, value in values.items() if name.startswith("loss/")}
        speed = {"img/s": f"{values['images_per_sec']:.3g}"}
        self._bar.set_postfix(losses | speed, refresh=False)
        self._bar.update(step - last_step)

    def close(self) -> None:
        """Writes out what is buffered and ends the progress bar."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self._bar.close()
        try:
            self._events.close()
            file.close()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            if self._mirror:
                self._mirror.close()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"cannot write the metrics to {self._directory}: {error.strerror or error}")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def cut_after(path: Path, step: int) -> None:
    """Keeps each step up to `step` exactly once in a metrics file, the last line of it, and nothing else.

    A torn last line (the process died while writing) is dropped; the file is replaced in one rename.
    """
    if not path.exists():
        return
    kept: dict[int, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            found = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: line %d is torn and was dropped", path, number)
            continue
        if found <= step:
            kept[found] = line
    scratch = path.with_suffix(".jsonl.tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.writelines(kept[found] + "\n" for found in sorted(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from filter(None, (line.strip() for line in file))
