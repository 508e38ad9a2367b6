"""Folders of tiny published models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import published


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one of each."""
    root = tmp_path_factory.mktemp("published")
    published.clipseg(root / "clipseg")
    published.florence2(root / "florence2")
    published.sam3(root / "sam3")
    published.grounding_dino(root / "dino")
    published.grounding_dino(root / "mm", mm=True)
    published.sam(root / "sam")
    published.sam(root / "sam-hq", hq=True)
    published.sam2(root / "sam2")
    return root
