"""Masks as PNG: read back the same by others, whole or not there."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from risam_cli.drawing.png import encode_mask, encode_rgb
from risam_cli.errors import OutputError
from risam_cli.files.write import write_file


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (37, 53), (300, 200)])
def test_every_reader_gets_0_and_255(tmp_path: Path, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random(shape) < 0.4
    path = tmp_path / "m.png"
    path.write_bytes(encode_mask(mask))
    wanted = np.where(mask, 255, 0)
    assert (np.asarray(Image.open(path)) == wanted).all()
    assert (np.asarray(Image.open(path).convert("L")) == wanted).all()
    assert (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) == wanted).all()
    assert (cv2.imread(str(path))[..., 1] == wanted).all()
    assert np.asarray(Image.open(path)).dtype == np.uint8


def test_the_same_mask_gives_the_same_bytes() -> None:
    mask = np.zeros((40, 30), bool)
    mask[3:9, 4:20] = True
    assert encode_mask(mask) == encode_mask(np.asfortranarray(mask))
    assert encode_mask(mask) != encode_mask(~mask)


def test_colours_come_back(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode_rgb(rgb))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == rgb).all()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_file(tmp_path / "folder", b"x")
    with pytest.raises(OutputError, match=r"a\.bin"):
        write_file(path / "below", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "folder"]
