"""Images of every ordinary kind, and of the broken kinds, through one decoder."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from risam_cli.commands import predict as command
from risam_cli.data.images import images
from risam_cli.data.images.files import file_sha256, file_stamp
from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.transforms import fit_size, resize_for_encoder
from risam_cli.errors import ImageError
from risam_cli.inference import loading

RNG = np.random.default_rng(7)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that survives JPEG and scaling: gradients and one bright block."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1).astype(np.uint8)
    rgb[height // 8 : height // 3, width // 8 : width // 3] = (250, 20, 20)
    return rgb


PICTURE = smooth(48, 80)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "webp", "jpg", "ppm", "jp2"])
def test_every_ordinary_kind_reads_as_what_was_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(PICTURE).save(path, **lossless.get(suffix, {}))
    read = images.open_rgb(path)
    assert read.dtype == np.uint8
    assert read.shape == PICTURE.shape
    tolerance = {"gif": 16, "jpg": 3, "jp2": 2}.get(suffix, 0)
    assert np.abs(read.astype(int) - PICTURE).mean() <= tolerance
    assert images.image_size(path) == (48, 80)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF decoder")
def test_avif_reads(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.avif", quality=95)
    read = images.open_rgb(tmp_path / "a.avif")
    assert np.abs(read.astype(int) - PICTURE).mean() < 6


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    drawn = Image.fromarray(PICTURE).convert(mode)
    path = tmp_path / ("a.jpg" if mode in {"CMYK", "YCbCr"} else "a.png")
    drawn.save(path, quality=95)
    wanted = np.asarray(drawn.convert("RGB")).astype(int)
    assert np.abs(images.open_rgb(path).astype(int) - wanted).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_lie_on_white(tmp_path: Path, mode: str) -> None:
    layered = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    layered.putpixel((0, 0), (10, 10, 10, 255))
    layered.putpixel((1, 0), (0, 0, 0, 128))
    suffix = "tif" if mode == "PA" else "png"
    if mode == "PA":  # a palette with transparency, as PNG has it
        layered, suffix = layered.quantize(8), "png"
    else:
        layered = layered.convert(mode)
    layered.save(tmp_path / f"a.{suffix}")
    read = images.open_rgb(tmp_path / f"a.{suffix}")
    assert read[0, 0].tolist() == [10, 10, 10]
    assert np.abs(read[0, 1].astype(int) - 127).max() <= 1
    assert read[1, 3].tolist() == [255, 255, 255]


def test_a_transparent_colour_of_16_bits_lies_on_white(tmp_path: Path) -> None:
    """A PNG without alpha may name one colour that is transparent."""
    deep = np.array([[1000, 1001, 65535, 0]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "gray.png", transparency=1000)
    assert images.open_rgb(tmp_path / "gray.png")[0, :, 0].tolist() == [255, 4, 255, 0]
    small, _ = images.open_for_encoder(tmp_path / "gray.png", 4)
    assert small[0, :, 0].tolist() == [255, 4, 255, 0]
    cv2 = pytest.importorskip("cv2")
    data = cv2.imencode(".png", np.stack([deep // 4, deep // 2, deep], axis=-1))[1].tobytes()
    named = b"tRNS" + struct.pack(">3H", 1000, 500, 250)
    chunk = struct.pack(">I", 6) + named + struct.pack(">I", zlib.crc32(named))
    at = data.index(b"IDAT") - 4
    (tmp_path / "colour.png").write_bytes(data[:at] + chunk + data[at:])
    read = images.open_rgb(tmp_path / "colour.png")
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("deep", "suffix", "wanted"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), "png", [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], np.uint16), "tif", [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], np.int32), "tif", [0, 1, 128, 255]),
        (np.array([[0, 500_000, 1_000_000]], np.int32), "tif", [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), "tif", [0, 128, 255]),
        (np.array([[-10.0, 0.0, 10.0, np.nan]], np.float32), "tif", [0, 128, 255, 128]),
        (np.array([[7.0, 7.0]], np.float32), "tif", [0, 0]),
    ],
)
def test_deep_samples_are_scaled_to_8_bit(
    tmp_path: Path, deep: np.ndarray, suffix: str, wanted: list[int]
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(deep).save(path)
    read = images.open_rgb(path)
    assert read[0, :, 0].tolist() == wanted
    assert (read[..., 0] == read[..., 2]).all()


def test_16_bit_colour_keeps_the_high_bytes(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    deep = np.zeros((2, 3, 3), np.uint16)
    deep[0, 0] = (65535, 32896, 0)  # OpenCV's order: blue, green, red
    cv2.imwrite(str(tmp_path / "a.png"), deep)
    assert images.open_rgb(tmp_path / "a.png")[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PICTURE).save(path, exif=exif, quality=95)
    wanted = turns[orientation](PICTURE)
    read = images.open_rgb(path)
    assert read.shape == wanted.shape
    assert np.abs(read.astype(int) - wanted).mean() < 4
    assert images.image_size(path) == wanted.shape[:2]
    for size in (8, 64):
        scaled, own = images.open_for_encoder(path, size)
        assert own == wanted.shape[:2]
        assert scaled.shape[:2] == fit_size(*own, size)
        difference = np.abs(scaled.astype(int) - resize_for_encoder(wanted.copy(), size))
        assert difference.mean() < 8


def test_of_several_frames_the_first_counts(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue"))
    for suffix in ("gif", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        red.save(path, save_all=True, append_images=[blue], **options)
        assert images.open_rgb(path)[2, 4].tolist() == [255, 0, 0], suffix


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """A JPEG with one more application segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[2:]


@pytest.mark.parametrize(
    ("marker", "payload"),
    [
        (0xE1, b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"),
        (0xE1, b"Exif\0\0" + os.urandom(200)),
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"),
        (0xE2, b"ICC_PROFILE\0\x01\x01" + b"\xff" * 64),
        (0xE2, b"ICC_PROFILE\0\x09\x02"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff"),
    ],
)
def test_damaged_metadata_does_not_cost_the_pixels(
    tmp_path: Path, marker: int, payload: bytes
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG", quality=95)
    path = tmp_path / "a.jpg"
    path.write_bytes(with_segment(buffer.getvalue(), marker, payload))
    assert images.open_rgb(path).shape == PICTURE.shape
    assert images.image_size(path) == (48, 80)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", mode) for mode in ("RGB", "L", "CMYK")]
    + [("png", mode) for mode in ("RGB", "L", "RGBA", "P", "I;16")]
    + [("tif", "CMYK")],
)
def test_the_cheap_way_down_agrees_with_the_plain_one(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    large = Image.fromarray(smooth(613, 907))
    if mode == "I;16":
        large = Image.fromarray(np.asarray(large.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        large = large.convert(mode)
    path = tmp_path / f"a.{suffix}"
    large.save(path, quality=95)
    for size in (48, 200) if suffix == "jpg" else (48,):
        scaled, own = images.open_for_encoder(path, size)
        plain = resize_for_encoder(images.open_rgb(path), size)
        assert own == (613, 907)
        assert scaled.shape == plain.shape
        assert 0 < np.abs(scaled.astype(int) - plain).mean() < 1.0
        exact = images.read_for_encoder(path, [sam_frame(size)], full_decode=True)
        assert np.array_equal(exact.rgb, plain)


def test_a_jpeg_decoder_goes_down_by_itself_to_no_less_than_twice_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth(600, 800)).save(path)
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def seen(self: ImageFile.ImageFile) -> object:
        decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", seen)
    least = {100: (200, 150), 150: (400, 300), 200: (400, 300), 201: (800, 600), 400: (800, 600)}
    for size, wanted in least.items():
        decoded.clear()
        images.read_for_encoder(path, [sam_frame(size)])
        assert set(decoded) == {wanted}
        decoded.clear()
        images.read_for_encoder(path, [sam_frame(size)], full_decode=True)
        assert set(decoded) == {(800, 600)}


def test_hash_and_stamp_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    read = images.read_for_encoder(path, [sam_frame(16)])
    assert read.sha256 == file_sha256(path)
    assert read.stamp == file_stamp(path)
    assert read.size == (48, 80)
    assert file_stamp(tmp_path / "none.png") is None
    assert file_sha256(tmp_path / "none.png") is None


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no good, each with what its message must say."""
    jpeg, png = io.BytesIO(), io.BytesIO()
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(jpeg, "JPEG")
    noise.save(png, "PNG")
    contents = {
        "zero.jpg": (b"", "0 bytes"),
        "text.jpg": ("schön, a shopping list\n".encode(), "holds text"),
        "page.png": (b"<!doctype html><html>", "holds text"),
        "cut.jpg": (jpeg.getvalue()[:2000], "truncated"),
        "cut.png": (png.getvalue()[:4000], "truncated"),
        "head.jpg": (jpeg.getvalue()[:3], "truncated or damaged"),
        "head.png": (png.getvalue()[:12], "truncated or damaged"),
        "noise.webp": (bytes(range(128, 256)) * 9, "not an image of a known kind"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "pip install 'risam[heif]'"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "holds text"),
        "riff.webp": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8), "damaged"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    return {name: text for name, (_, text) in contents.items()}


def test_each_broken_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for name, text in broken_files(tmp_path).items():
        for read in (images.open_rgb, lambda path: images.open_for_encoder(path, 32)):
            with pytest.raises(ImageError) as caught:
                read(tmp_path / name)
            assert text in str(caught.value), name
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    cases = {
        tmp_path / "none.jpg": "no such file",
        tmp_path: "is a folder",
        tmp_path / "pipe.jpg": "not a regular file",
        Path("a\0b.jpg"): "not a valid file path",
        tmp_path / ("x" * 300 + ".jpg"): "name too long",
    }
    for path, text in cases.items():
        with pytest.raises(ImageError) as caught:
            images.open_rgb(path)
        assert text in str(caught.value).lower()


def test_images_over_the_limit_are_refused_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    assert images.open_rgb(path, max_pixels=48 * 80).shape == PICTURE.shape
    for read in (images.open_rgb, images.image_size):
        with pytest.raises(ImageError, match=r"3840 pixels.*3839.*max_pixels"):
            read(path, 48 * 80 - 1)
    with pytest.raises(ImageError, match=r"3840 pixels.*100.*max_pixels"):
        images.open_rgb(path, max_pixels=100)


def test_a_header_that_lies_about_its_size_allocates_nothing(tmp_path: Path) -> None:
    header = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"
    import zlib

    chunk = b"IHDR" + header
    crc = struct.pack(">I", zlib.crc32(chunk))
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc
    (tmp_path / "bomb.png").write_bytes(data + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    with pytest.raises(ImageError, match="pixels"):
        images.open_rgb(tmp_path / "bomb.png")


SEEDS: list[bytes] = []
for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, kind)
    SEEDS.append(stream.getvalue())


@settings(max_examples=150)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=12),
    keep=st.floats(0.02, 1),
)
def test_damaged_files_raise_nothing_but_image_errors(
    tmp_path_factory: pytest.TempPathFactory,
    seed: bytes,
    edits: list[tuple[float, int]],
    keep: float,
) -> None:
    data = bytearray(seed[: max(1, int(len(seed) * keep))])
    for where, value in edits:
        data[int(where * len(data))] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    try:
        rgb, _ = images.open_for_encoder(path, 32, max_pixels=1 << 22)
    except ImageError:
        return
    assert rgb.dtype == np.uint8
    assert max(rgb.shape[:2]) == 32


def test_the_command_says_the_same_limits_as_the_modules() -> None:
    assert command.MAX_PIXELS == images.MAX_PIXELS
    assert command.TIMEOUT == loading.TIMEOUT


def test_a_png_with_spoilt_pixel_data_is_no_black_image(tmp_path: Path) -> None:
    path = tmp_path / "spoilt.png"
    Image.new("RGB", (48, 48), (200, 10, 10)).save(path)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"IDAT") + 4
    whole[start : start + 4] = b"\xff\xff\xff\xff"  # no stream that zlib knows
    path.write_bytes(bytes(whole))
    with pytest.raises(ImageError, match=r"spoilt\.png"):
        images.open_rgb(path)
    with pytest.raises(ImageError, match=r"spoilt\.png"):
        images.open_for_encoder(path, 32)
