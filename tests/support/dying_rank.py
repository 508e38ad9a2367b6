"""``risam`` under torchrun, where one process kills itself once, in the middle of its work.

torchrun … dying_rank.py RANK COMMITS ARGUMENT...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from risam_cli.cli import main
from risam_cli.evaluation.answer_log import AnswerLog
from risam_cli.runs.writer import RunWriter


def die_in(kind: type[Any], name: str, calls: int) -> None:
    """Has this process killed after so many calls of a method."""
    method, left = getattr(kind, name), [calls]

    def counted(*args: Any) -> Any:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return method(*args)

    setattr(kind, name, counted)


if __name__ == "__main__":
    rank, calls = sys.argv[1:3]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in(RunWriter, "_append", int(calls))
        die_in(AnswerLog, "write", int(calls))
    sys.exit(main(sys.argv[3:]))
