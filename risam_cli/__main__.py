"""``risam`` and ``python -m risam_cli``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; a Ctrl-C while it is still imported ends without a traceback."""
    before = signal.signal(signal.SIGINT, _leave)
    from risam_cli.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
