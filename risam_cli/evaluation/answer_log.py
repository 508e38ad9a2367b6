"""A model's answers kept on disk while an evaluation goes on, so that it can be continued."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from risam_cli.console.console import get_console
from risam_cli.data.images.files import file_sha256
from risam_cli.data.readers.predictions import Answer, PredictionIndex
from risam_cli.data.readers.results import MAX_LINE
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import DataError, Interrupted, OutputError, setting
from risam_cli.evaluation.scoring import ANSWERS_FILE, Answered
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.files.patience import within
from risam_cli.files.write import write_file, writing
from risam_cli.inference.loading import TIMEOUT
from risam_cli.types import Expression, Sample

SYNCED = 2.0
"""Seconds after which answers are made to be on the disk."""

_HEADER = "\0settings"  # an id that no expression has
ASKED = "expressions"
"""The setting that says how many there were; they may change."""


class AnswerLog:
    """Answers of a run in progress, so that an interrupted one can go on.

    The first line holds the settings, every other one an answer, under a key of what it was an
    answer to (the image's name, the expression's id and text) and with the hash of the image file.
    So an image or a text that changed since is asked again, and what was added or taken away costs
    the others nothing.

    Args:
        settings: what results depend on; a resumed run must have the same.
        size: (H, W) of all masks, where the protocol compares them at a size of its own.
        resume, overwrite: go on with, or replace, what an interrupted run left.

    Attributes:
        known: the answers of the interrupted run; None where there is none.

    Raises:
        OutputError: an interrupted run lies there and neither was asked for, or it had other
            settings, or the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = folder / ANSWERS_FILE
        self.known: PredictionIndex | None = None
        self._size = size
        self._synced = time.monotonic()
        self._header = header = {"id": _HEADER, "settings": dict(settings)}
        held = self.path.exists() and self.path.stat().st_size > 0
        if held and not (resume or overwrite):
            raise OutputError(
                f"{folder} holds an interrupted run",
                f"continue with {setting('resume')}, or start over with {setting('overwrite')}",
            )
        with writing(self.path):
            if held and resume:
                self._require(header)
                write_file(self.path, self._copy_whole_lines)
                self.known = PredictionIndex(self.path, lambda failure: None, size)
            else:
                write_file(self.path, seal(header))
            self._stream = self.path.open("ab")

    def _copy_whole_lines(self, part: Path) -> None:
        """Leaves out what a kill or a power cut left torn or damaged: it is asked again."""
        with open(self.path, "rb") as old, open(part, "wb") as new:
            old.readline(MAX_LINE)
            new.write(seal(self._header))
            for line in iter(partial(old.readline, MAX_LINE), b""):
                with suppress(ValueError):
                    unseal(line)
                    new.write(line)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stream.close()
        if self.known is not None:
            self.known.close()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                "interrupted; finished work is kept", f"continue with {setting('resume')}"
            ) from error

    def write(self, answered: Answered, image: str | None) -> None:
        """Append the answers of one image; they are with the system before it counts as done.

        A power cut costs no more than the answers of some :data:`SYNCED` seconds.

        Args:
            image: SHA-256 of the image file.

        Raises:
            OutputError: they cannot be written.
        """
        pairs = zip(answered.sample.expressions, answered.answers, strict=True)
        with writing(self.path):
            for expression, answer in pairs:
                if answer is not None and image is not None:
                    row = _row(answered.sample, expression, answer, image)
                    self._stream.write(seal(row))
            self._stream.flush()
            if time.monotonic() - self._synced > SYNCED:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def tell_changes(self, source: SampleSource) -> None:
        """Say how a data set that changed differs from what the interrupted run answered."""
        if self.known is None:
            return
        found = [
            len(self.known.records(_key(group.image, phrase.id, phrase.text)))
            for group in source.chosen()
            for phrase in group.phrases
        ]
        gone = len(self.known) - sum(found) - 1  # the header
        if gone or self._asked != source.planned:
            get_console().info(
                f"the expressions changed: {sum(map(bool, found))} answered before are kept, "
                f"{gone} are gone, {found.count(0)} are to be answered"
            )

    def recall(self, sample: Sample) -> Answered | None:
        """The answers of an image that the interrupted run finished, else None.

        The image file is hashed only where the run answered all that is asked of it.
        """
        if self.known is None:
            return None
        try:
            lines = [
                self.known.records(_key(sample.image, one.id, one.text))
                for one in sample.expressions
            ]
        except DataError:  # a line that a power cut spoilt
            return None
        if not all(lines):
            return None
        try:
            image = within(TIMEOUT, lambda: file_sha256(sample.path))
        except TimeoutError:  # the loader will say so
            return None
        answers = []
        for known in lines:
            same = [line for line in known if line.get("sha256") == image]
            if not same:
                return None
            try:
                size = self._size or sample.size
                answers.append(self.known.answer(same[-1], size, str(self.path)))
            except DataError:  # a line that a power cut spoilt
                return None
        return Answered(sample, tuple(answers))

    def finished(self) -> None:
        """The run is done and scored: the file is not needed any more."""
        self.path.unlink(missing_ok=True)

    def _require(self, header: Mapping[str, Any]) -> None:
        with self.path.open("rb") as stream:
            first = stream.readline(MAX_LINE)
        try:
            own = unseal(first)["settings"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.path} is damaged", f"start over with {setting('overwrite')}"
            ) from None
        wanted = json.loads(json.dumps(header["settings"]))
        self._asked = own.get(ASKED)
        for key in sorted({*own, *wanted} - {ASKED}):
            if own.get(key) != wanted.get(key):
                raise OutputError(
                    f"the interrupted run in {self.path.parent} had {key} {own.get(key)!r}, this "
                    f"one has {wanted.get(key)!r}",
                    f"give the same settings, or start over with {setting('overwrite')}",
                )


def gather_answers(folder: OutputFolder, parts: Sequence[Path]) -> None:
    """Put the answers that processes left in their parts into one file, as of one that resumes.

    Raises:
        OutputError: they do not belong together, or the file cannot be written.
    """

    def join(part: Path) -> None:
        headers = set()
        with open(part, "wb") as out:
            for place, path in enumerate(parts):
                with open(path / ANSWERS_FILE, "rb") as answers:
                    header = answers.readline(MAX_LINE)
                    headers.add(header)
                    out.write(b"" if place else header)
                    shutil.copyfileobj(answers, out)
        if len(headers) > 1:
            raise OutputError(
                f"the parts in {folder.path} were made by different settings",
                f"start over with {setting('overwrite')}",
            )

    folder.write(ANSWERS_FILE, join)


def _key(image: str, name: str, text: str) -> str:
    asked = json.dumps([image, name, text])
    return blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _row(sample: Sample, expression: Expression, answer: Answer, image: str) -> dict[str, Any]:
    return {
        "id": _key(sample.image, expression.id, expression.text),
        "sha256": image,
        "asked": expression.id,
        "segmentation": answer.segmentation,
        "score": answer.score,
        "no_target": answer.no_target,
        "no_target_probability": answer.no_target_probability,
    }
