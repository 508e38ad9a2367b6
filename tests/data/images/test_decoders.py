"""Every mode, depth, layout and compression that is opened, held against a second decoder.

TIFFs are written and read again by tifffile, everything else by OpenCV and imagecodecs. A file is
either read as the second decoder reads it, or refused with its bands and depth; never something
else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import image_size, open_rgb, read_for_encoder
from risam_cli.errors import ImageError

H, W = 40, 48
DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32"]
DTYPES += ["float16", "float32", "float64"]
PICTURES = [("minisblack", 1), ("miniswhite", 1), ("minisblack", 2), ("minisblack", 5)]
PICTURES += [("rgb", 3), ("rgb", 4), ("rgb", 6)]


def scene(dtype: str, bands: int) -> NDArray[Any]:
    """Ramps (H, W, bands) over the whole range of a type, 0..1 for floats."""
    y, x = np.mgrid[0:H, 0:W]
    ramps = [(x * 5) % 256, (y * 6) % 256, (x + y) * 2, 100 + x, 255 - y, x * 0 + 9]
    share = np.stack(ramps[:bands], axis=-1) / 255
    kind = np.dtype(dtype)
    if kind == np.bool_:
        return share > 0.5
    if kind.kind == "f":
        return share.astype(kind)
    most = np.iinfo(kind)
    return (
        np.round(share * (float(most.max) - most.min) + most.min)
        .clip(most.min, most.max)
        .astype(kind)
    )


def eight_bits(samples: NDArray[Any]) -> NDArray[np.float64]:
    """The rule for depth, told again: 0..255 as floats."""
    values = samples.astype(np.float64)
    if samples.dtype == np.bool_:
        return values * 255
    if samples.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if samples.dtype == np.uint16 or (samples.dtype.kind != "f" and low >= 0 and high <= 65535):
        low, high = 0, 65535
    elif samples.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0, 1
    return np.asarray((values - low) / (high - low) * 255)


def expected(samples: NDArray[Any], photometric: str, alpha: bool) -> NDArray[np.float64]:
    """What a picture of these samples (H, W, bands) is on white, by the rules of the module."""
    own = 3 if photometric == "rgb" else 1
    picture = eight_bits(samples[..., :own])
    if photometric == "miniswhite":
        picture = 255 - picture
    if alpha:
        band = samples[..., own : own + 1].astype(np.float64)
        share = band if samples.dtype.kind == "f" else band / np.iinfo(samples.dtype).max
        share = share.clip(0, 1)
        picture = picture * share + (1 - share) * 255
    return np.broadcast_to(picture, (*samples.shape[:2], 3)) if own == 1 else picture


def tiffs(path: Path, dtype: str, photometric: str, bands: int) -> Iterator[bool]:
    """Writes one TIFF after another to ``path``; yields whether its fourth band is alpha."""
    samples = scene(dtype, bands)
    layouts = ["contig", "separate"] if bands > 1 else [None]
    packings = [None, "zlib", "lzw", "packbits", "zstd", "lzma", "jpeg"]
    for layout, packing, order, tile, predictor in itertools.product(
        layouts, packings, "<>", (None, (16, 16)), (False, True)
    ):
        if predictor and (packing not in ("zlib", "lzw") or dtype == "bool"):
            continue
        if packing == "jpeg" and (dtype != "uint8" or bands not in (1, 3)):
            continue
        data = samples[..., 0] if bands == 1 else samples
        if layout == "separate":
            data = np.moveaxis(samples, -1, 0)
        own = 3 if photometric == "rgb" else 1
        kinds = ["unassalpha" if bands == 4 else "unspecified"] * (bands - own)
        tifffile.imwrite(
            path,
            data,
            photometric=photometric,
            planarconfig=layout,
            compression=packing,
            byteorder=order,
            tile=tile,
            predictor=predictor,
            rowsperstrip=None if tile else 7,
            extrasamples=kinds or None,
            metadata=None,
        )
        yield bands == 4


def by_tifffile(path: Path, bands: int) -> NDArray[Any]:
    """Its samples (H, W, bands)."""
    found = tifffile.imread(path)
    if bands == 1:
        return found[..., None]
    return found if found.shape[-1] == bands else np.moveaxis(found, 0, -1)


REFUSED = {("minisblack", 2), ("minisblack", 5)}
SEEN: dict[str, int] = {"read": 0, "refused": 0}


@pytest.mark.parametrize(("photometric", "bands"), PICTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiff_is_read_as_tifffile_reads_it_or_refused(
    dtype: str, photometric: str, bands: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    number = 0
    for alpha in tiffs(path, dtype, photometric, bands):
        number += 1
        samples = by_tifffile(path, bands)
        lossy = tifffile.TiffFile(path).pages[0].compression == 7
        if (photometric, bands) in REFUSED or (dtype == "bool" and bands > 1):
            with pytest.raises(ImageError, match=rf"a TIFF of {bands} bands of \d+ bits"):
                open_rgb(path)
            SEEN["refused"] += 1
            continue
        found = open_rgb(path).astype(np.float64)
        wanted = expected(samples, photometric, alpha)
        difference = np.abs(found - wanted)
        # Pillow cuts 16-bit colour to its high byte, and libraries differ by little in JPEG.
        assert difference.max() <= (6 if lossy else 1.51), (number, difference.max())
        assert image_size(path) == (H, W)
        SEEN["read"] += 1
    assert number >= 14


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "bool"])
def test_named_bands_of_a_tiff_are_its_colours(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for _ in tiffs(path, dtype, "minisblack", 5):
        samples = by_tifffile(path, 5)
        wanted = eight_bits(samples[..., [3, 0, 4]])
        assert np.abs(open_rgb(path, bands=(4, 1, 5)) - wanted).max() <= 1.01
        encoded = read_for_encoder(path, [sam_frame(64)], bands=(4, 1, 5))
        assert encoded.size == (H, W)
        with pytest.raises(ImageError, match="band 6 is asked for; its bands are 1 to 5"):
            open_rgb(path, bands=(6, 1, 1))
        assert image_size(path, bands=(4, 1, 5)) == (H, W)
        with pytest.raises(ImageError, match="it is not known which are red, green and blue"):
            image_size(path)  # a look at the header tells, too


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_orientation_turns_deep_tiffs_as_it_does_others(
    dtype: str, orientation: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    samples = scene(dtype, 3)[:, :20]
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(
        path,
        np.moveaxis(samples, -1, 0),
        photometric="rgb",
        planarconfig="separate",
        extratags=tags,
        metadata=None,
    )
    by_pillow = Image.fromarray(eight_bits(samples).round().astype(np.uint8))
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    wanted = by_pillow if orientation == 1 else by_pillow.transpose(turned[orientation])
    found = open_rgb(path)
    assert found.shape == np.asarray(wanted).shape
    assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1
    assert image_size(path) == found.shape[:2]


# --- other formats --------------------------------------------------------------------------------


def others() -> dict[str, tuple[str, bytes, NDArray[Any], int]]:
    """Name -> suffix, file, samples as a second encoder was given them, tolerance."""
    found: dict[str, tuple[str, bytes, NDArray[Any], int]] = {}
    for dtype, bands in itertools.product(("uint8", "uint16"), (1, 2, 3, 4)):
        samples = scene(dtype, bands)
        data = samples[..., 0] if bands == 1 else samples
        found[f"PNG {dtype} {bands}"] = (".png", imagecodecs.png_encode(data), samples, 1)
        if bands != 2:
            jp2 = imagecodecs.jpeg2k_encode(data, codecformat="jp2", reversible=True, level=0)
            found[f"JPEG 2000 {dtype} {bands}"] = (".jp2", jp2, samples, 1)
        if bands in (1, 3):
            suffix = {1: ".pgm", 3: ".ppm"}[bands]
            bgr = data if bands == 1 else data[..., ::-1]
            found[f"PNM {dtype} {bands}"] = (
                suffix,
                cv2.imencode(suffix, np.ascontiguousarray(bgr))[1].tobytes(),
                samples,
                1,
            )
    for bands in (1, 3, 4):
        samples = scene("uint8", bands)
        data = samples[..., 0] if bands == 1 else samples
        bgr = np.ascontiguousarray(data if bands == 1 else data[..., [2, 1, 0, 3][:bands]])
        found[f"BMP {bands}"] = (".bmp", cv2.imencode(".bmp", bgr)[1].tobytes(), samples, 0)
        if bands != 4:
            found[f"JPEG {bands}"] = (".jpg", imagecodecs.jpeg8_encode(data, level=100), samples, 6)
            how = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_QUALITY, 100]
            jpeg = cv2.imencode(".jpg", bgr, how)[1].tobytes()
            found[f"JPEG progressive {bands}"] = (".jpg", jpeg, samples, 6)
        if bands > 1:
            webp = imagecodecs.webp_encode(data, lossless=True)
            found[f"WebP {bands}"] = (".webp", webp, samples, 0)
            avif = imagecodecs.avif_encode(data, level=100)
            found[f"AVIF {bands}"] = (".avif", avif, samples, 3)
    return found


OTHERS = others()


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_read_as_a_second_encoder_wrote_them(name: str, tmp_path: Path) -> None:
    suffix, data, samples, tolerance = OTHERS[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    bands = samples.shape[2]
    wanted = expected(samples, "rgb" if bands > 2 else "minisblack", bands in (2, 4))
    found = open_rgb(path)
    assert np.abs(found - wanted).max() <= tolerance + 0.51
    assert image_size(path) == (H, W)


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


@pytest.mark.parametrize("mode", [*MODES, *DEEP])
def test_pillows_own_modes_in_tiff(mode: str, tmp_path: Path) -> None:
    """What tifffile does not write: Pillow's own, against what was put in."""
    gray = scene("uint8", 1)
    path = tmp_path / "a.tif"
    if mode in DEEP:
        made = Image.fromarray(gray[..., 0].astype(DEEP[mode]) * 257)
        made.save(path)
        wanted = eight_bits(np.asarray(made)[..., None]) + np.zeros(3)
    else:
        made = Image.fromarray(scene("uint8", 3)).convert("RGBA").convert(mode)
        made.save(path)
        wanted = np.asarray(made.convert("RGB"), np.float64)
    assert np.abs(open_rgb(path) - wanted).max() <= 1.01


def test_heic_and_jpeg_xl_are_read_where_their_plugins_are(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    import pillow_heif

    samples = scene("uint8", 3)
    heic = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(samples)).save(heic, quality=100)
    jxl = tmp_path / "a.jxl"
    jxl.write_bytes(imagecodecs.jpegxl_encode(samples, lossless=True))
    assert np.abs(open_rgb(heic).astype(int) - samples).mean() < 4
    assert np.array_equal(open_rgb(jxl), samples)
    assert image_size(heic) == image_size(jxl) == (H, W)


@pytest.mark.parametrize(
    ("head", "extra"),
    [(b"\0\0\0\x18ftypheic", "heif"), (b"\0\0\0\x18ftypmif1", "heif"), (b"\xff\x0a\0\0", "jxl")],
)
def test_without_a_plugin_the_message_names_the_extra(
    head: bytes, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    path = tmp_path / "a.jpg"  # phones and browsers call them anything
    path.write_bytes(head + bytes(64))
    with pytest.raises(ImageError, match=rf"pip install 'risam\[{extra}\]'"):
        open_rgb(path)
