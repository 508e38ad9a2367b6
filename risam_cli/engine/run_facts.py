"""Facts for ``run.json``: what was there, with what it was made, what it took."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def count_lines(path: Path) -> int:
    """Lines of a file; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def versions() -> dict[str, str]:
    """Of Python and of the packages that results can depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pillow", "opencv-python-headless", "pycocotools"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def peak_memory_mb() -> float | None:
    """Most memory that this process has held so far, in MiB; None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
