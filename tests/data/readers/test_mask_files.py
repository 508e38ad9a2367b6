"""Files of masks: which way up they are, and which colours are in the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from risam_cli.data.images.images import open_rgb
from risam_cli.data.readers.mask_files import read_mask_file
from risam_cli.masks import rle as masks

CORNER = np.zeros((24, 40), np.bool_)
CORNER[:8, :16] = True


def read(path: Path) -> np.ndarray:
    return masks.decode(read_mask_file(path, "line 1", lambda doubt: None, no_file=""))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_a_photo_of_the_same_orientation(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(CORNER.astype(np.uint8) * 255).save(path, exif=exif)
    seen = open_rgb(path)[..., 0] >= 128
    assert seen.shape == ((40, 24) if orientation > 4 else (24, 40))
    assert np.array_equal(read(path), seen)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "tif"), ("RGB", "png")]
)
def test_white_is_in_the_mask_whatever_the_colours_are_made_of(
    mode: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(CORNER.astype(np.uint8) * 255).convert("RGB").convert(mode).save(path)
    assert np.array_equal(read(path), CORNER)


def test_an_opaque_lossy_file_is_judged_as_one_without_alpha(tmp_path: Path) -> None:
    path = tmp_path / "m.jp2"
    dim = Image.fromarray(CORNER.astype(np.uint8) * 100).convert("RGBA")
    dim.save(path, irreversible=True, quality_mode="rates", quality_layers=[8])
    assert np.asarray(Image.open(path))[..., :3].any(axis=2).sum() > CORNER.sum()
    assert np.array_equal(read(path), CORNER)
