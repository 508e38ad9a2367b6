"""One call of predict on a fake network, for the tests of runs and of faults."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.data.inputs.inputs import Inputs
from risam_cli.inference.pipeline import PredictSettings
from risam_cli.interrupts import StopRequest
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import LEDGER
from risam_cli.runs.run import RunPlan, run_predict
from risam_cli.runs.writer import Saving
from support.predict_fakes import FakeModel

CPU = torch.device("cpu")
FILES = ("predictions.jsonl", "failures.jsonl")


def draw_pictures(folder: Path, count: int = 8) -> Path:
    """Images of different sizes, one of them broken."""
    for number in range(count):
        path = folder / ("sub" if number % 3 == 0 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:
            path.write_text("not an image")
            continue
        draw(path, number)
    return folder


def draw(path: Path, number: int) -> None:
    rgb = np.zeros((12 + number, 24, 3), np.uint8)
    rgb[:, 4 + number : 18] = 255 - number
    Image.fromarray(rgb).save(path)


@dataclass
class Run:
    """One call of predict on a fake network."""

    inputs: Sequence[str | Path]
    output: Path
    e: Sequence[str] = ("bright", "the thing")
    model: FakeModel = field(default_factory=FakeModel)
    overwrite: bool = False
    saving: Saving = field(default_factory=lambda: Saving(True, False, MAX_PIXELS))
    settings: PredictSettings = field(
        default_factory=lambda: PredictSettings(CPU, batch_size=2, lookahead=16)
    )
    stream: BinaryIO | None = None
    plan: dict[str, Any] = field(default_factory=dict)

    def go(self) -> int:
        inputs = Inputs([str(one) for one in self.inputs], self.e)
        inputs.check()
        plan = RunPlan(inputs, self.settings, self.saving, **self.plan)
        with RunFolder(self.output) as folder:
            if self.overwrite:
                folder.start_anew()
            return run_predict(plan, self.model, folder, self.stream)

    @property
    def encoded(self) -> int:
        return len(self.model.network.encoded)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run wrote, but for what may differ: the ledger's stamps and run.json."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".risam" not in path.parts and path.name != "run.json"
    }
    found.pop(LEDGER, None)
    return found


def run_json(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return loaded


class Killed(BaseException):
    """Stands for the end of the process: nothing of the project catches it."""


def kill_at(model: FakeModel, image: int) -> None:
    def check(pixels: torch.Tensor) -> None:
        if len(model.network.encoded) == image:
            raise Killed

    model.network.before_encode = check


def at_image(run: Run, number: int, act: Callable[[], None]) -> None:
    """Calls ``act`` once, before the image of that number goes through the network."""
    first = threading.Lock()

    def check(pixels: torch.Tensor) -> None:
        if len(run.model.network.encoded) == number and first.acquire(blocking=False):
            act()

    run.model.network.before_encode = check


def signals(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Sends this process a signal, from another thread, and waits until the run has heard it."""
    heard = threading.Semaphore(0)
    on_signal = StopRequest._on_signal

    def hear(self: StopRequest, number: int, frame: FrameType | None) -> None:
        try:
            on_signal(self, number, frame)
        finally:
            heard.release()

    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        assert heard.acquire(timeout=120), f"nobody heard {number.name}"

    monkeypatch.setattr(StopRequest, "_on_signal", hear)
    return send
