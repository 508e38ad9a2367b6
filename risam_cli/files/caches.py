"""Where what can be made again is kept for later processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """This user's: ``$XDG_CACHE_HOME/risam``, or ``~/.cache/risam``; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "risam"
