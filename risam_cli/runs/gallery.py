"""The gallery of a run, from what is in its folder: records, failures, and the items of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import OutputError, reason_of, setting
from risam_cli.files.jsonlines import load_json
from risam_cli.inference.unknown_words import UnknownWords
from risam_cli.outputs.gallery import Gallery, Row, about
from risam_cli.outputs.naming import GALLERY, OVERLAYS
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.ledger import LEDGER, LedgerLine, Span, read_header, read_lines, read_span


def write_gallery(folder: Path, write: Callable[[str, str], None], model: str = "") -> Path | None:
    """Write the page of what is done in an output folder; gives the page's path.

    Follows from the folder's content alone: a run that was cut off and went on, or that was put
    together from shards, gives the bytes of one that was neither. None where the run does not save
    a gallery.

    Args:
        write: writes a file of the folder, given its name and text.
        model: the name of the one that answered.

    Raises:
        OutputError: the folder cannot be read or written, or was changed by someone else.
    """
    identity = read_header(folder / LEDGER)
    if identity is None or "html" not in identity.get("save", ()):
        return None
    gallery = Gallery(folder, about(identity), write, model=model)
    unknown = UnknownWords(model or "the model")
    for row in _rows(folder):
        for record in row.records:
            if not record.get("instance"):
                unknown.note(record.get("unknown_words", ()))
        gallery.add(row)
    if text := unknown.summary():
        gallery.warning = f"{text}: {unknown.named()}"
    return gallery.finish()


def _rows(folder: Path) -> Iterator[Row]:
    try:
        with (
            open(folder / PREDICTIONS, "rb") as predictions,
            open(folder / FAILURES, "rb") as failures,
        ):
            for line, _ in read_lines(folder / LEDGER):
                answers = _objects(predictions, line.predictions, folder)
                wrong = _objects(failures, line.failures, folder)
                if answers or wrong:
                    name = (answers or wrong)[0]["image"]
                    yield Row(name, answers, wrong, _file(line, GALLERY), _file(line, OVERLAYS))
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {reason_of(error)}") from None


def _objects(file: BinaryIO, span: Span, folder: Path) -> list[dict[str, Any]]:
    data = read_span(file, span)
    if data is None:
        raise OutputError(
            f"{folder / os.path.basename(file.name)} was changed by someone else during the run",
            f"continue with {setting('resume')}",
        )
    return [load_json(text) for text in data.splitlines()]


def _file(line: LedgerLine, top: str) -> str | None:
    return next((mark.path for mark in line.files if mark.path.startswith(f"{top}/")), None)
