"""What a training run tells while it runs: ``metrics.jsonl``, TensorBoard, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.console.console import Console
from risam_cli.drawing.drawing import encode_webp
from risam_cli.errors import reason_of
from risam_cli.files.jsonlines import load_json
from risam_cli.files.write import sync_file, sync_folder, write_file, writing
from risam_cli.training.checkpoint import Place

METRICS = "metrics.jsonl"
PICTURES = "pictures"
INDEX = "index.json"

_QUALITY = 80


@dataclass(frozen=True)
class Example:
    """A validation example that is drawn again and again.

    Attributes:
        key: a name for files; held_out: the validation set; image: its name; text: expression.
        truth, answer: (H, W, 3) uint8, the image with the mask drawn over it.
    """

    key: str
    held_out: str
    image: str
    text: str
    truth: NDArray[np.uint8]
    answer: NDArray[np.uint8]


class TrainingLog:
    """Rows and pictures of a run; rows of a cut run that its checkpoint does not know are dropped.

    Args:
        folder: the run's; silent: another process writes.
    """

    def __init__(self, folder: Path, console: Console, *, silent: bool = False) -> None:
        self.folder = folder
        self.console = console
        self.silent = silent
        self.path = folder / METRICS
        self._board: Any = None

    def sync(self) -> None:
        """Has the system write the rows so far to the disk.

        Raises:
            OutputError: it cannot.
        """
        if self.path.exists():
            with writing(self.path):
                sync_file(self.path)
            sync_folder(self.folder)

    def __enter__(self) -> TrainingLog:
        if not self.silent:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # A full disk, which has been told of.
            self._tell_board("close")

    def row(self, place: Place, name: str, figures: Mapping[str, float], kind: str) -> None:
        """Adds one row; ``name`` is the stage's.

        Raises:
            OutputError: it cannot be written.
        """
        if self.silent:
            return
        row = {
            "kind": kind,
            "stage": place.stage,
            "name": name,
            "step": place.step,
            "seconds": round(place.seconds, 1),
            "expressions": place.expressions,
            **{key: None if math.isnan(v) else round(v, 6) for key, v in figures.items()},
        }
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for key, value in figures.items():
            self._tell_board("add_scalar", f"{name}/{kind}/{key}", value, place.step)

    def pictures(self, place: Place, name: str, examples: Sequence[Example]) -> None:
        """Keeps the examples as they are answered now.

        Raises:
            OutputError: they cannot be written.
        """
        if self.silent or not examples:
            return
        folder = self.folder / PICTURES
        with writing(folder):
            folder.mkdir(exist_ok=True)
        for example in examples:
            write_file(folder / f"{example.key}-truth.webp", encode_webp(example.truth, _QUALITY))
            step = f"stage{place.stage + 1}-step{place.step:08d}"
            write_file(folder / f"{example.key}-{step}.webp", encode_webp(example.answer, _QUALITY))
            pair = _beside(example.truth, example.answer)
            self._tell_board(
                "add_image", f"{name}/{example.key}", pair, place.step, dataformats="HWC"
            )
        told = [
            {k: v for k, v in asdict(e).items() if k not in ("truth", "answer")} for e in examples
        ]
        text = json.dumps(told, ensure_ascii=False, indent=1) + "\n"
        write_file(folder / INDEX, text)

    def drop_rows_after(self, place: Place) -> None:
        """Removes rows that a cut run wrote after its last checkpoint."""
        if self.silent or not self.path.is_file():
            return
        kept = [line + b"\n" for line, row in read_rows(self.path) if _known(row, place)]
        write_file(self.path, b"".join(kept))

    def _tell_board(self, method: str, *values: Any, **named: Any) -> None:
        """TensorBoard is a second telling: without room for it, the run goes on."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*values, **named)
        except OSError as error:
            self._board = None
            self.console.warn(f"TensorBoard's log ends here: {reason_of(error)}")


def read_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of ``metrics.jsonl`` with their rows; torn and damaged ones are left out."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            row = load_json(line)
            if isinstance(row, dict) and _is_row(row):
                yield line, row


def _is_row(row: Mapping[str, Any]) -> bool:
    own = isinstance(row.get("kind"), str) and all(
        type(row.get(key)) is int and 0 <= row[key] < 1 << 63 for key in ("stage", "step")
    )
    return own and all(type(row.get(key, 0)) in (int, float) for key in ("seconds", "best"))


def _known(row: Mapping[str, Any], place: Place) -> bool:
    at = (row["stage"], row["step"])
    if row["kind"] == "average":
        return place.averaged or row["stage"] + (place.step == 0) < place.stage
    if at == (place.stage, place.step) and row["kind"] != "train":
        return place.validated == place.step
    return at <= (place.stage, place.step)


def _beside(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two pictures side by side, the lower one filled up with gray."""
    height = max(len(left), len(right))
    sides = [
        np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=96) for p in (left, right)
    ]
    gap = np.full((height, 8, 3), 255, np.uint8)
    return np.concatenate([sides[0], gap, sides[1]], axis=1)
