"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile

# Several test processes share the cores; torch's own threads would only get in each other's way.
# This must stand before anything imports torch or numpy.
os.environ["OMP_NUM_THREADS"] = "1"
# No test reads or writes what this user's own commands keep.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="risam-tests-cache-")

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image
from support.cli import Cli
from support.paths import REPO

from risam_cli.console.console import Console, set_console
from risam_cli.errors import keyword, use_front_end

# A loaded machine must not fail a property test for its time.
settings.register_profile(
    "risam", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("risam")

_NUMBERS = itertools.count()


def pytest_unconfigure() -> None:
    """Takes the cache of this test process away."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def console_of_its_own() -> None:
    """What one test made of ``--quiet`` or ``--verbose`` must not silence the next."""
    set_console(Console())


@pytest.fixture(autouse=True)
def settings_by_their_keys() -> None:
    """Messages name settings by key, whichever front end was imported or ran before."""
    use_front_end(keyword)


@pytest.fixture(autouse=True)
def cache_of_its_own() -> Iterator[None]:
    """What ``risam doctor`` keeps in one test must not choose threads in the next."""
    shared = os.environ["XDG_CACHE_HOME"]
    os.environ["XDG_CACHE_HOME"] = os.path.join(shared, str(next(_NUMBERS)))
    yield
    os.environ["XDG_CACHE_HOME"] = shared


@pytest.fixture(autouse=True)
def limit_of_its_own() -> Iterator[None]:
    """What one test made of Pillow's limit must not refuse the pictures of the next."""
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photos beside the checkout; tests that take it skip where it is absent."""
    folder = REPO.parent / "shared" / "photos" / "images"
    if not folder.is_dir():
        pytest.skip("no folder of photos beside the checkout")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and an empty cache of the Hugging Face hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run ``python -m risam_cli ARGS`` as a process of its own; its exit code is not checked.

    ``env`` adds to the environment, ``cwd`` defaults to the checkout.
    """

    def run(
        *args: str | Path,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "risam_cli", *map(str, args)],
            input="" if input is None else input,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(REPO), **(env or {})},
            cwd=cwd or REPO,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the whole network at a very small size, with random weights; read-only.

    Its input is 64x64 pixels; seeded, so that every test process makes the same one.
    """
    import torch

    from risam_cli.settings.load import check
    from risam_cli.settings.model import ModelSettings
    from risam_cli.weights.build import build_model, new_text_parts
    from risam_cli.weights.folder import write_model_folder

    small: dict[str, Any] = {
        "preset": "tiny",
        "image_encoder": {
            "image_size": 64,
            "dim": 48,
            "depth": 3,
            "heads": 3,
            "out_dim": 32,
            "window": 2,
            "global_blocks": [2],
            "taps": [0, 1, 2],
            "stem": [8, 16, 24],
        },
        "text_encoder": {"vocabulary": "refshapes", "hidden": 32, "layers": 1, "heads": 2},
        "fusion": {"dim": 32, "heads": 2, "blocks": 1, "ffn_dim": 48},
        "decoder": {"heads": 2, "layers": 1, "ffn_dim": 48, "mask_dim": 8},
    }
    settings = check(ModelSettings, small, "the fixture model_folder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = new_text_parts(settings.text_encoder)
        model = build_model(settings, text)
    folder = tmp_path_factory.mktemp("models") / "small"
    write_model_folder(
        folder,
        model.state_dict(),
        settings.model_dump(),
        text.config.to_dict(),
        text.tokenizer.to_json(),
        {"name": "small", "figures": {"miou": 0.125}},
        "A model with random weights, for tests.\n",
    )
    return folder


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    """A folder of six small images of several kinds, two of them in a subfolder.

    ``a.png`` 40x30 (width x height) RGB, ``b.jpg`` 64x48, ``c.png`` gray 33x17, ``d.webp`` 20x50,
    ``sub/a.png`` 25x25 with alpha, ``sub/e.bmp`` 31x47.
    """
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    kinds = [
        ("a.png", (30, 40, 3)),
        ("b.jpg", (48, 64, 3)),
        ("c.png", (17, 33)),
        ("d.webp", (50, 20, 3)),
        ("sub/a.png", (25, 25, 4)),
        ("sub/e.bmp", (47, 31, 3)),
    ]
    for name, shape in kinds:
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder
