"""``risam`` and ``python -m risam_cli``."""

from __future__ import annotations

# The module under ``signal``: it is there at once, where ``signal`` takes milliseconds to import.
import _signal  # type: ignore[import-not-found]
import os
import sys


def _leave(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


# A Ctrl-C while the command line is still imported ends without a traceback.
_before = _signal.signal(_signal.SIGINT, _leave)


def main() -> int:
    """Run the command line."""
    from risam_cli.cli import main as run

    _signal.signal(_signal.SIGINT, _before)
    return run()


if __name__ == "__main__":
    sys.exit(main())
