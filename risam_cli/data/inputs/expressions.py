"""Expressions that are asked of every image, from a text file."""

from __future__ import annotations

from pathlib import Path

from risam_cli.errors import DataError, UsageError, reason_of, setting
from risam_cli.files.jsonlines import read_text

_LONGEST = 1 << 28  # bytes of a file of expressions


def read_expressions(path: Path) -> list[str]:
    """The expressions of a text file, one a line; blank lines are skipped.

    Raises:
        DataError: it cannot be read.
        UsageError: it holds none.
    """
    try:
        lines = read_text(path, _LONGEST).split("\n")
    except OSError as error:
        raise DataError(
            f"{setting('expressions', path)}: {reason_of(error)}", "check the path"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{setting('expressions', path)}: not UTF-8", "save it as UTF-8") from None
    except ValueError as error:
        raise DataError(f"{setting('expressions', path)}: {error}", "split it") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{setting('expressions', path)}: holds no expression", "one per line")
    return found
