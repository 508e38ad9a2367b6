"""The Python API: what goes in, what comes out, and that it is what ``risam predict`` gives."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.cli import Cli
from support.paths import REPO

import risam_cli
from risam_cli.cli import main
from risam_cli.errors import ImageError, ModelError, OutputError, UsageError
from risam_cli.masks import rle as masks
from risam_cli.weights.folder import BUNDLED, find_model

SCENES = REPO / "sample_data" / "images"
TEXTS = ["the gray square", "the leftmost object", "<b>red</b> & star"]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> risam_cli.Model:
    return risam_cli.load(model_folder, device="cpu")


def _same(a: Any, b: Any) -> bool:
    return (a.rle, a.box, a.score, a.no_target) == (b.rle, b.box, b.score, b.no_target)


def _without_names(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in ("id", "image")}


# --- the same as the command ----------------------------------------------------------------------


def test_results_are_those_of_the_command_to_the_bit(cli: Cli, tmp_path: Path) -> None:
    """With the bundled model: an image by path, as an array, as Pillow's, encoded beforehand."""
    paths = ["sample_data/images/scene_1.png", "sample_data/images/scene_3.png"]
    asked = [word for text in TEXTS for word in ("-e", text)]
    options = ("--save", "none", "--device", "cpu", "-o", tmp_path / "out")
    done = cli("predict", *paths, *asked, *options)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    model = risam_cli.load(device="cpu")
    found = model.predict([REPO / path for path in paths], TEXTS)
    assert any(result.area for results in found for result in results)
    for number, path in enumerate(paths):
        records = [_without_names(line) for line in lines[3 * number : 3 * number + 3]]
        with Image.open(REPO / path) as picture:
            array = np.array(picture.convert("RGB"))
            answers = [
                found[number],
                model.predict(array, TEXTS),
                model.predict(picture, TEXTS),
                model.encode(array).predict(TEXTS),
            ]
        for results in answers:
            assert [_without_names(result.to_json()) for result in results] == records


def test_record_ids_are_those_of_the_command(
    model: risam_cli.Model, model_folder: Path, tmp_path: Path
) -> None:
    image = SCENES / "scene_1.png"
    common = ("--model", str(model_folder), "--save", "none", "--device", "cpu")
    asked = ("-e", TEXTS[0], "-e", TEXTS[1], "-o", str(tmp_path / "out"))
    assert main(["predict", str(image), *asked, *common]) == 0
    written = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert [result.to_json() for result in model.predict(image, TEXTS[:2])] == written


# --- shapes and kinds -----------------------------------------------------------------------------


def test_the_answer_has_the_shape_of_the_question(model: risam_cli.Model) -> None:
    paths = [SCENES / "scene_1.png", SCENES / "scene_2.jpg"]
    one = model.predict(paths[0], "the star")
    assert isinstance(one, risam_cli.Result)
    by_expression = model.predict(str(paths[0]), ["the star", "the ring"])
    assert isinstance(by_expression, risam_cli.Results)
    assert [result.expression for result in by_expression] == ["the star", "the ring"]
    by_image = model.predict(iter(paths), "the star")
    assert isinstance(by_image, risam_cli.Results)
    assert [result.image for result in by_image] == [str(path) for path in paths]
    both = model.predict(paths, ("the star", "the ring"))
    assert [[result.expression for result in results] for results in both] == [
        ["the star", "the ring"]
    ] * 2
    assert _same(one, by_expression[0])
    assert _same(one, by_image[0])
    assert _same(one, both[0][0])
    assert model.predict([], "the star") == []
    assert len(model.predict(np.array([*map(str, paths)]), "the star")) == 2


def test_a_result_holds_what_the_mask_is(model: risam_cli.Model) -> None:
    result = model.predict(SCENES / "scene_4.jpg", "the star", no_target_threshold=1)
    height, width = result.size
    with Image.open(SCENES / "scene_4.jpg") as image:
        assert image.size == (width, height)
    assert result.mask.shape == (height, width)
    assert result.mask.dtype == np.bool_
    assert result.area == result.mask.sum() == masks.area(result.rle)
    assert tuple(result.box) == tuple(masks.bbox(result.rle))
    assert 0 <= result.score <= 1
    assert not result.no_target


@pytest.mark.parametrize(
    "shape", [(30, 40, 3), (30, 40, 4), (30, 40), (30, 40, 1)], ids=["rgb", "rgba", "gray", "gray1"]
)
def test_an_array_is_what_its_file_is(
    model: risam_cli.Model, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array[..., 0] if shape[-1] == 1 else array).save(tmp_path / "a.png")
    assert _same(model.predict(array, "star"), model.predict(tmp_path / "a.png", "star"))


def test_sixteen_bits_turned_and_large_images_are_what_their_files_are(
    model: risam_cli.Model, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    deep = rng.integers(0, 65536, (30, 40), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert _same(model.predict(deep, "star"), model.predict(tmp_path / "deep.png", "star"))
    large = rng.integers(0, 256, (700, 500, 3), dtype=np.uint8)  # many times the 64 pixels
    Image.fromarray(large).save(tmp_path / "large.png")
    assert _same(model.predict(large, "star"), model.predict(tmp_path / "large.png", "star"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(large[:50, :60]).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert _same(model.predict(turned, "star"), model.predict(tmp_path / "turned.jpg", "star"))


def test_a_large_jpeg_is_decoded_whole_where_that_is_asked(
    model_folder: Path, tmp_path: Path
) -> None:
    large = np.random.default_rng(7).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "large.jpg")
    model = risam_cli.load(model_folder, device="cpu", full_decode=True)
    with Image.open(tmp_path / "large.jpg") as picture:
        pixels = np.array(picture)
    encoded = [model.encode(given) for given in (tmp_path / "large.jpg", pixels)]
    assert (encoded[0]._encoded.image.rgb == encoded[1]._encoded.image.rgb).all()
    assert _same(model.predict(tmp_path / "large.jpg", "star"), model.predict(pixels, "star"))


def test_an_array_of_images_is_several(model: risam_cli.Model) -> None:
    batch = np.random.default_rng(5).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    found = model.predict(batch, "star")
    assert [result.image for result in found] == ["image 0", "image 1", "image 2"]
    assert all(_same(a, model.predict(b, "star")) for a, b in zip(found, batch, strict=True))
    flipped = model.predict(batch[0, :, ::-1], "star")  # not contiguous
    assert _same(flipped, model.predict(batch[0, :, ::-1].copy(), "star"))


# --- work done once, and lazily -------------------------------------------------------------------


def _count(model: risam_cli.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    network = model._segmenter.loaded.model
    real = network.encode_image

    def encode_image(pixels: Any) -> Any:
        calls.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(network, "encode_image", encode_image)
    return calls


def test_an_image_is_encoded_once(model: risam_cli.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _count(model, monkeypatch)
    model.predict(SCENES / "scene_1.png", [f"star {k}" for k in range(40)])
    assert calls == [1]
    encoded = model.encode(SCENES / "scene_1.png")
    assert calls == [1, 1]
    many = encoded.predict(TEXTS)
    assert _same(encoded.predict(TEXTS[0]), model.predict(SCENES / "scene_1.png", TEXTS[0]))
    assert len(many) == 3
    encoded.predict("the ring", threshold=0.1)
    assert calls == [1, 1, 1]


def test_thresholds_are_those_of_the_command(model: risam_cli.Model) -> None:
    array = np.random.default_rng(6).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    encoded = model.encode(array)
    for options in ({"threshold": 0.0}, {"threshold": 1.0}, {"no_target_threshold": 0.0}):
        one, other = model.predict(array, "star", **options), encoded.predict("star", **options)
        assert _same(one, other)
        if "threshold" in options and not one.no_target:
            assert one.area == (1200 if options["threshold"] == 0 else 0)
        if "no_target_threshold" in options:
            assert one.no_target
            assert one.area == 0


def test_a_stream_is_read_only_so_far_ahead(model: risam_cli.Model) -> None:
    given = []

    def endless() -> Iterator[np.ndarray[Any, Any]]:
        number = 0
        while True:
            given.append(number)
            yield np.full((8, 8, 3), number % 256, np.uint8)
            number += 1

    stream = model.predict_iter(endless(), "star")
    assert given == []
    first = [next(stream) for _ in range(3)]
    assert [results[0].image for results in first] == ["image 0", "image 1", "image 2"]
    assert len(given) < 80
    stream.close()  # type: ignore[attr-defined]


def test_a_model_serves_several_threads(model: risam_cli.Model) -> None:
    images = [SCENES / f"scene_{k}.{kind}" for k, kind in ((1, "png"), (2, "jpg"), (3, "png"))]
    alone = [model.predict(image, TEXTS) for image in images]
    with ThreadPoolExecutor(3) as pool:
        rounds = list(pool.map(lambda image: model.predict(image, TEXTS), images * 4))
    for together, single in zip(rounds, alone * 4, strict=True):
        assert all(_same(a, b) for a, b in zip(together, single, strict=True))


def test_pairs_bring_their_own_expressions(model: risam_cli.Model) -> None:
    image = SCENES / "scene_1.png"
    found = list(model.predict_iter([(image, "the star"), (image, ["a", "b"]), image], "common"))
    assert [[result.expression for result in results] for results in found] == [
        ["the star"],
        ["a", "b"],
        ["common"],
    ]


def test_progress_is_a_bar_on_stderr(
    model: risam_cli.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    model.predict([SCENES / "scene_1.png"] * 2, "star", progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""


# --- errors ---------------------------------------------------------------------------------------


def test_a_bad_image_raises_or_is_kept(model: risam_cli.Model, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = SCENES / "scene_1.png"
    with pytest.raises(ImageError, match=r"bad\.png: the file holds text"):
        model.predict([good, bad], "star")
    with pytest.raises(ImageError, match=r"bad\.png"):
        model.encode(bad)
    wrong = np.zeros((4, 4, 5), np.uint8)
    kept = list(model.predict_iter([bad, good, wrong], ["a", "b"], on_error="keep"))
    assert [(len(results), len(results.failures)) for results in kept] == [(0, 2), (2, 0), (0, 2)]
    assert kept[0].failures[0].error == "ImageError"
    assert "bad.png" in kept[0]._repr_html_()
    assert "shape (4, 4, 5)" in kept[2].failures[0].message


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 3)), "float64 is not an image; give (H, W, 3)"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros(4, np.uint8), "shape (4,)"),
        (np.array("a.png"), "shape ()"),
    ],
)
def test_what_is_no_image_is_an_image_error(model: risam_cli.Model, image: Any, says: str) -> None:
    for call in (model.predict, lambda given, _: model.encode(given)):
        with pytest.raises(ImageError) as caught:
            call(image, "star")
        assert says in str(caught.value)


def test_wrong_usage_is_a_usage_error(model: risam_cli.Model) -> None:
    image = SCENES / "scene_1.png"
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (image, "  ", {}, "the expression '  ' has no words"),
        (image, [], {}, "no expression is given"),
        (image, [1], {}, "an expression is a int"),
        (image, "\ud800", {}, "not Unicode"),
        (image, "star", {"threshold": 1.5}, "threshold 1.5 is not a number in 0..1"),
        (image, "star", {"no_target_threshold": float("nan")}, "is not a number in 0..1"),
        (image, "star", {"threshold": "0.5"}, "threshold '0.5' is not a number in 0..1"),
        (image, b"star", {}, "an expression is bytes"),
        ({"a": image}, "star", {}, "the images are a dict"),
        ([image, 7], "star", {}, "image 1 is a int"),
        (image, 5, {}, "the expressions are a int"),
    ]
    for given, expressions, options, says in wrong:
        with pytest.raises(UsageError, match=says.replace("(", r"\(")):
            model.predict(given, expressions, **options)
    array = np.zeros((8, 8, 3), np.uint8)
    for single in (5, image, str(image), image.read_bytes(), array, Image.fromarray(array)):
        with pytest.raises(UsageError, match=f"the images are a {type(single).__name__}; give a"):
            model.predict_iter(single, "star")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no expression"):
        list(model.predict_iter([image]))
    with pytest.raises(UsageError, match="on_error 'skip' is unknown"):
        model.predict_iter([image], "star", on_error="skip")  # type: ignore[arg-type]


def test_a_place_that_is_none_is_a_usage_error(model: risam_cli.Model, tmp_path: Path) -> None:
    encoded = model.encode(SCENES / "scene_1.png")
    result, explained = encoded.predict("star"), encoded.explain("star")
    for place in ("", None, 3, b"a.png", "a\0.png"):
        for save in (result.save, explained.save):
            with pytest.raises(UsageError, match="is not a path"):
                save(place)  # type: ignore[arg-type]
    for place in (".", Path(), "/"):
        with pytest.raises(UsageError, match="names no file"):
            result.save(place)


def test_loading_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError):
        risam_cli.load(tmp_path / "none")
    monkeypatch.chdir(BUNDLED / "refshapes-tiny")  # "" is not the working folder
    with pytest.raises(ModelError, match="no model folder ''"):
        risam_cli.load("")
    with pytest.raises(ModelError, match="no model folder ''"):
        find_model("")
    with pytest.raises(UsageError, match="not a device"):
        risam_cli.load(device="gpu")
    with pytest.raises(UsageError, match="batch_size 0"):
        risam_cli.load(batch_size=0)
    with pytest.raises(UsageError, match="batch_size '8' is not a whole number"):
        risam_cli.load(batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"workers 1\.5 is not a whole number"):
        risam_cli.load(workers=1.5)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        risam_cli.lod  # type: ignore[attr-defined]  # noqa: B018


# --- in a notebook --------------------------------------------------------------------------------


def test_results_show_themselves(model: risam_cli.Model, tmp_path: Path) -> None:
    results = model.predict(SCENES / "scene_1.png", TEXTS)
    page = results._repr_html_()
    assert page.count("<figure") == 3
    assert "&lt;b&gt;red&lt;/b&gt; &amp; star" in page
    assert "<b>red" not in page
    with Image.open(io.BytesIO(results[0]._repr_png_())) as shown:
        assert max(shown.size) >= 256
    assert "the gray square" in repr(results[0])
    results[0].save(tmp_path / "sub" / "mask.png")
    with Image.open(tmp_path / "sub" / "mask.png") as mask:
        assert (np.asarray(mask) == 255 * results[0].mask).all()
    assert repr(model) == "<Model 'small' on cpu, fp32>"


def test_an_image_in_memory_is_kept_where_that_is_asked(model: risam_cli.Model) -> None:
    array = np.full((20, 900, 3), 200, np.uint8)
    kept = model.predict(array, "star")
    assert kept.overlay().shape[1] == 900
    (streamed,) = next(iter(model.predict_iter([array], "star")))
    with pytest.raises(ImageError, match="not kept"):
        streamed.overlay()
    with Image.open(io.BytesIO(streamed._repr_png_())) as shown:
        assert shown.size[0] == 640


def test_attention_comes_with_an_encoded_image(model: risam_cli.Model) -> None:
    encoded = model.encode(np.full((32, 64, 3), 99, np.uint8))
    found = encoded.attention("the red star")
    assert [word.text for word in found.words if not word.special] == ["the", "red", "star"]
    assert found.words_of_regions() is not None
    assert found.words_of_regions().shape == (2, 4, 5)  # type: ignore[union-attr]
    for odd in (["a", "b"], ["a"], 5):
        with pytest.raises(UsageError, match=f"the expression is a {type(odd).__name__}"):
            encoded.attention(odd)  # type: ignore[arg-type]


def test_an_explanation_is_a_page_in_a_notebook_and_files(
    model: risam_cli.Model, tmp_path: Path
) -> None:
    encoded = model.encode(SCENES / "scene_1.png")
    why = encoded.explain(TEXTS[:2], points=[(3, 4)], block=0)
    frame = why._repr_html_()
    (page,) = re.findall(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts"', frame)
    assert html.unescape(page).startswith("<!doctype html>")
    assert "the gray square" in page
    names = why.save(tmp_path / "why", with_json=True)
    assert sorted(names) == [
        "0-the-gray-square.png",
        "1-the-leftmost-object.png",
        "explain.html",
        "explain.json",
    ]
    assert (tmp_path / "why/explain.html").read_text(encoding="utf-8") == html.unescape(page)
    with pytest.raises(OutputError, match="is not empty"):
        why.save(tmp_path / "why")
    with pytest.raises(UsageError, match="block -1: the model 'small' has 1 blocks"):
        encoded.explain("star", block=-1)
    with pytest.raises(UsageError, match="is not in the image"):
        encoded.explain("star", points=[(256, 0)])
    points: Any
    for points in ([(1,)], [3], ["ab"], [(1, float("nan"))], 4, [(1, 2, 3)]):
        with pytest.raises(UsageError, match="point"):
            encoded.explain("star", points=points)
    for name in ("block", "head"):
        chosen: dict[str, Any] = {name: "0"}
        with pytest.raises(UsageError, match=f"{name} '0' is not a whole number"):
            encoded.explain("star", **chosen)


def test_the_package_itself_is_light() -> None:
    script = (
        "import sys, risam_cli; assert {'load', 'Model'} <= set(dir(risam_cli))"
        "; print(sorted({'torch', 'numpy', 'cv2', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
def test_a_files_bytes_are_what_the_file_is(
    model: risam_cli.Model, wrap: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    deep = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    Image.fromarray(deep).save(path)
    (of_file,) = model.predict(path, TEXTS[:1])
    (of_bytes,) = model.predict(wrap(path.read_bytes()), TEXTS[:1])
    assert np.array_equal(of_file.mask, of_bytes.mask)
    assert of_file.score == of_bytes.score
    with pytest.raises(ImageError, match="image 0: the file is truncated"):
        model.predict(wrap(path.read_bytes()[:200]), TEXTS[:1])
    with pytest.raises(ImageError, match="holds text, not an image"):
        model.predict(wrap(b"<html>no such page</html>"), TEXTS[:1])


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "RGBa",
        "La",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "I;16B",
    ],
)
def test_every_mode_of_pillows_is_an_image(model: risam_cli.Model, mode: str) -> None:
    picture = Image.new("RGB", (30, 20), (200, 40, 60))
    known = {"I;16", "I;16B", "LAB", "PA", "RGBa", "La"}  # nothing is converted to these at once
    made = Image.new(mode, (30, 20)) if mode in known else picture.convert(mode)
    (result,) = model.predict(made, TEXTS[:1])
    assert result.mask.shape == (20, 30)


def at_end(data: bytes) -> io.BytesIO:
    file = io.BytesIO(data)
    file.seek(len(data))
    return file


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (None, UsageError, "image 0 is None"),
        (5, UsageError, "image 0 is a int"),
        (b"", ImageError, "the file is empty"),
        (at_end(b"bytes"), ImageError, "positioned at its end; rewind it with seek"),
        (io.StringIO("text"), ImageError, "open the file in binary mode"),
    ],
)
def test_what_cannot_be_an_image_is_a_typed_error(
    model: risam_cli.Model, image: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        model.predict(image, TEXTS[:1])
    assert "--" not in str(raised.value)


def test_a_text_that_is_too_long_is_refused_as_by_the_command(model: risam_cli.Model) -> None:
    with pytest.raises(UsageError, match="10001 characters, more than 10000"):
        model.predict(Image.new("RGB", (30, 20)), "x" * 10_001)


def test_an_image_in_a_store_is_named_by_its_url(model: risam_cli.Model, tiny_images: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/api/a.png", (tiny_images / "a.png").read_bytes())
    found = model.predict("memory://api/a.png", "the star")
    assert found.image == "memory://api/a.png"
    assert _same(found, model.predict(tiny_images / "a.png", "the star"))
    memory.rm("/api", recursive=True)
    with pytest.raises(ImageError, match=r"memory://api/a\.png: no such"):
        model.predict("memory://api/a.png", "the star")
