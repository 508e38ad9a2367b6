"""Attention maps: what the network computed, put on words and regions, and the command's files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import explain_cases as cases
from support.cli import Cli
from support.networks import SMALL, small_settings
from support.text_folders import make_clip

from risam_cli.cli import main
from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.memory import memory_for_encoder
from risam_cli.errors import ModelError, UsageError
from risam_cli.explain.attention import Attention, Word, words_of
from risam_cli.explain.explanation import spread
from risam_cli.explain.page import PAGE_BYTES, chosen_maps
from risam_cli.explain.picture import draw_explanation, enlarge
from risam_cli.inference.pipeline import Encoded, Session
from risam_cli.model.layers import sine_positions_1d, sine_positions_2d
from risam_cli.settings.load import merge
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.folder import write_model_folder
from risam_cli.weights.text import pretrained_text
from risam_cli.weights.tokenizer import Piece, TextTokenizer

# --- the maps -------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_are_the_softmaxes_of_the_first_block() -> None:
    """By hand: A = (F_v W_v)(F_l W_l)ᵀ/√d for each head, over words, and over regions."""
    loaded = cases.small_loaded()
    found = cases.attention_of(loaded, cases.noise_image())
    model = loaded.model
    block: Any = model.attention[0]
    encoded = cases.session_of(loaded).encode(
        memory_for_encoder(cases.noise_image(), [sam_frame(64)], "it")
    )
    visual = encoded.features.visual[0].flatten(1).T  # (16, C)
    position = model.project_position(sine_positions_2d(4, 4, model.dim, torch.device("cpu")))
    tokens = loaded.tokenizer.encode([cases.TEXT])
    words = model.encode_text(tokens.input_ids, tokens.attention_mask).words[0]  # (T, C)
    placed = words + sine_positions_1d(len(words), model.dim, torch.device("cpu"))
    query = block.affinity_vision(visual + position).numpy()
    key = block.affinity_language(placed).numpy()
    width = model.dim // block.heads
    assert found.regions_of_token is not None
    assert found.tokens_of_region is not None
    assert found.padding is not None
    for head in range(block.heads):
        own = slice(head * width, (head + 1) * width)
        affinity = query[:, own] @ key[:, own].T / math.sqrt(width)  # (16, T)
        powers = np.exp(affinity - affinity.max())
        over_words = (powers / powers.sum(1, keepdims=True)).reshape(4, 4, -1)
        over_regions = (powers / powers.sum(0, keepdims=True)).T.reshape(-1, 4, 4)
        # 30 of 60 rows are picture: two of the four rows of regions.
        np.testing.assert_allclose(found.tokens_of_region[0, head], over_words[:2], atol=1e-5)
        np.testing.assert_allclose(found.regions_of_token[0, head], over_regions[:, :2], atol=1e-5)
        outside = over_regions[:, 2:].sum((1, 2))
        np.testing.assert_allclose(found.padding[0, head], outside, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "grid", "extent"),
    [
        ((64, 64), (4, 4), (4, 4)),
        ((30, 60), (2, 4), (2, 4)),
        ((200, 70), (4, 2), (4, 1.375)),
        ((3, 90), (1, 4), (0.125, 4)),
    ],
)
def test_weights_sum_to_one_and_padding_is_apart(
    size: tuple[int, int], grid: tuple[int, int], extent: tuple[float, float]
) -> None:
    found = cases.attention_of(cases.small_loaded(), cases.noise_image(*size))
    assert (found.grid, found.extent, found.cells) == (grid, extent, 16)
    assert found.missing == ()
    count = len(found.words)
    for block in (None, 0, 1):
        for head in (None, 0, 1):
            regions = found.regions_of_words(block, head)
            padding = found.padding_of_words(block, head)
            heard = found.words_of_regions(block, head)
            assert regions is not None
            assert padding is not None
            assert heard is not None
            assert regions.shape == (count, *grid)
            assert heard.shape == (*grid, count)
            np.testing.assert_allclose(regions.sum((1, 2)) + padding, 1, atol=1e-5)
            np.testing.assert_allclose(heard.sum(-1), 1, atol=1e-5)
    if grid == (4, 4):
        assert found.padding is not None
        assert found.padding.max() == 0


def test_means_are_over_blocks_and_heads() -> None:
    found = cases.attention_of(cases.small_loaded(), cases.noise_image())
    each = [[found.words_of_regions(b, h) for h in range(2)] for b in range(2)]
    whole = np.mean(np.array(each), axis=(0, 1))
    np.testing.assert_allclose(found.words_of_regions(), whole, atol=1e-6)
    by_block = np.mean(np.array(each[1]), axis=0)
    np.testing.assert_allclose(found.words_of_regions(block=1), by_block, atol=1e-6)


def test_points_lie_in_regions() -> None:
    found = cases.attention_of(cases.small_loaded(), cases.noise_image(30, 60))
    assert found.region_at(0, 0) == (0, 0)
    assert found.region_at(59.5, 29.9) == (1, 3)
    assert found.region_at(14, 15) == (1, 0)
    assert found.region_at(15, 14.9) == (0, 1)
    for x, y in ((60, 0), (0, 30), (-0.1, 5), (float("nan"), 5)):
        with pytest.raises(UsageError, match="is not in the image of 60x30 pixels"):
            found.region_at(x, y)


def test_a_network_that_fails_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = cases.small_loaded()

    def broken(*_: object) -> None:
        raise RuntimeError("odd\nshapes")

    monkeypatch.setattr(loaded.model, "attention_maps", broken)
    with pytest.raises(ModelError, match="the network failed: odd shapes"):
        cases.attention_of(loaded, cases.noise_image())
    monkeypatch.setattr(loaded.model, "encode_image", broken)
    with pytest.raises(ModelError, match="the network failed: odd shapes"):
        cases.attention_of(loaded, cases.noise_image())


# --- words ----------------------------------------------------------------------------------------


def test_word_pieces_become_words() -> None:
    pieces = [
        Piece("[CLS]", None, (0, 0), False),
        Piece("um", 0, (0, 2), False),
        Piece("##brella", 0, (2, 8), False),
        Piece("red", 1, (9, 12), False),
        Piece("[UNK]", 2, (13, 14), True),
        Piece("[SEP]", None, (0, 0), False),
    ]
    words = words_of("Umbrella red ☂", pieces)
    assert words == (
        Word("[CLS]", (0,), special=True),
        Word("Umbrella", (1, 2)),
        Word("red", (3,)),
        Word("☂", (4,), unknown=True),
        Word("[SEP]", (5,), special=True),
    )
    weights = np.arange(2 * 2 * 1 * 1 * 6, dtype=np.float32).reshape(2, 2, 1, 1, 6)
    maps = np.moveaxis(weights, -1, 2)
    found = Attention(
        "", ("",) * 6, words, (8, 8), 1, (1.0, 1.0), maps, maps[..., 0, 0] / 2, weights
    )
    regions, heard = found.regions_of_words(0, 1), found.words_of_regions(0, 1)
    assert regions is not None
    assert heard is not None
    # Tokens 6 .. 11: over regions a word has the mean of its tokens, at a region their sum.
    assert regions[:, 0, 0].tolist() == [6, 7.5, 9, 10, 11]
    assert heard[0, 0].tolist() == [6, 15, 9, 10, 11]
    lost = found.padding_of_words(0, 1)
    assert lost is not None
    assert lost.tolist() == [3, 3.75, 4.5, 5, 5.5]


def test_words_of_the_small_vocabulary_and_of_clip(tmp_path: Path) -> None:
    words = cases.attention_of(
        cases.small_loaded(), cases.noise_image(), "The RED, wobbly  star"
    ).words
    shown = [(word.text, word.special, word.unknown) for word in words]
    assert shown == [
        ("[CLS]", True, False),
        ("The", False, False),
        ("RED", False, False),
        ("wobbly", False, True),
        ("star", False, False),
        ("[SEP]", True, False),
    ]
    clip = pretrained_text(str(make_clip(tmp_path / "clip")), 16).tokenizer
    text = "reds, circle"
    pieces = clip.pieces(text)
    assert [piece.text for piece in pieces] == told(clip, text)
    assert len(pieces) > 5  # its little vocabulary spells words out
    assert [word.text for word in words_of(text, pieces)][1:-1] == ["reds", ",", "circle"]
    assert [word.special for word in words_of(text, pieces)] == [True, False, False, False, True]


def told(tokenizer: TextTokenizer, text: str) -> list[str]:
    """The tokens that the network gets of a text."""
    return [tokenizer.tokenizer.id_to_token(k) for k in tokenizer.encode([text]).input_ids[0]]


def test_a_long_expression_is_cut_as_the_network_cuts_it() -> None:
    loaded = cases.small_loaded()
    short = TextTokenizer(loaded.tokenizer.tokenizer, 5, 0)
    assert [piece.text for piece in short.pieces(cases.TEXT)] == told(short, cases.TEXT)
    assert [piece.text for piece in short.pieces(cases.TEXT)][-1] == "[SEP]"


# --- what ablated models lack ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says", "has"),
    [
        ({"fusion": {"vision_guided": False}}, "no Vision-Guided Attention", (True, False)),
        ({"fusion": {"language_guided": False}}, "no Language-Guided Attention", (False, True)),
        (
            {"fusion": {"vision_guided": False, "language_guided": False}},
            "no Mutual-Aware Attention",
            (False, False),
        ),
    ],
)
def test_what_a_model_lacks_is_said_and_the_rest_is_shown(
    changes: dict[str, Any], says: str, has: tuple[bool, bool]
) -> None:
    found = cases.attention_of(cases.small_loaded(**changes), cases.noise_image())
    assert [says in line for line in found.missing] == [True]
    assert (found.regions_of_words() is not None, found.words_of_regions() is not None) == has
    explanation = cases.explanation_of(found)
    picture = draw_explanation(explanation, explanation.expressions[0])
    whole = cases.explanation_of(cases.attention_of(cases.small_loaded(), cases.noise_image()))
    assert picture.shape[1] == 1200
    taller = draw_explanation(whole, whole.expressions[0]).shape[0]
    assert (picture.shape[0] < taller) == (not has[0])


# --- pictures and page ----------------------------------------------------------------------------


def test_heat_lies_where_the_weight_is() -> None:
    weights = np.zeros((2, 4), np.float32)
    weights[1, 2] = 1
    drawn = enlarge(weights, (1.5, 4.0), (60, 160))
    assert drawn.shape == (60, 160)
    row, column = np.unravel_index(int(drawn.argmax()), drawn.shape)
    # The middle of the second row of regions is the picture's end: that row is cut in half.
    assert row == 59
    assert abs(int(column) - 100) <= 1
    assert drawn[:, :60].max() == 0


def test_spread_counts_regions() -> None:
    one = np.zeros((4, 5), np.float32)
    one[2, 3] = 0.3
    assert spread(one) == pytest.approx(1)
    assert spread(np.full((4, 5), 0.01, np.float32)) == pytest.approx(20)
    assert spread(np.zeros((4, 5), np.float32)) == pytest.approx(1)


def test_a_large_page_leaves_single_heads_out_and_says_so() -> None:
    small = cases.attention_of(cases.small_loaded(), cases.noise_image())
    whole, said = chosen_maps(cases.explanation_of(small))
    assert (len(whole), said) == (9, "")
    rows = columns = 64
    zeros = np.zeros((3, 8, 20, rows, columns), np.float32)
    words = tuple(Word(str(k), (k,)) for k in range(20))
    large = Attention(
        "", ("",) * 20, words, (640, 640), 4096, (64.0, 64.0), zeros, zeros[..., 0, 0], None
    )
    keys, said = chosen_maps(cases.explanation_of(*[large] * 3, block=1, head=5))
    assert keys == [(1, 5), (None, None), (0, None), (1, None), (2, None)]
    assert "single heads are left out" in said
    keys, said = chosen_maps(cases.explanation_of(*[large] * 30, block=1))
    assert keys == [(1, None), (None, None)]
    assert "single blocks and heads are left out" in said
    assert 2 * rows * columns * 20 * len(keys) * 3 < PAGE_BYTES


# --- the command ----------------------------------------------------------------------------------

Call = Callable[..., int]


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """``risam explain`` in this process, with a small model, into ``out``."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(cases.noise_image()).save("a.png")

    def call(*arguments: str, model: Path = model_folder) -> int:
        return main(
            ["explain", "a.png", *arguments, "-o", "out", "--model", str(model), "--device", "cpu"]
        )

    return call


@pytest.fixture
def explain_alone(run: Call, model_folder: Path) -> Call:
    """``risam explain`` of one argument, in the folder of ``run``."""

    def call(*arguments: str) -> int:
        base = ["explain", *arguments, "-e", "the star", "-o", "out", "--device", "cpu"]
        return main([*base, "--model", str(model_folder)])

    return call


def test_the_command_writes_pictures_page_and_maps(
    cli: Cli, model_folder: Path, tmp_path: Path
) -> None:
    Image.fromarray(cases.noise_image()).save(tmp_path / "a.png")
    asked = (
        "a.png",
        "-e",
        cases.TEXT,
        "-e",
        "the star",
        "--model",
        model_folder,
        "--device",
        "cpu",
    )
    done = cli("explain", *asked, "--json", "-o", "out", "--point", "50,20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    names = ["0-the-small-blue-square-left-of-the-wobbly.png", "1-the-star.png"]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {*names, "explain.html", "explain.json", "export.json"}
    assert "does not know 'wobbly'" in done.stderr
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.size[0] == 1200
    written = json.loads((tmp_path / "out/explain.json").read_text())
    done = cli("predict", *asked, "--save", "none", "-o", "p", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "p/predictions.jsonl").open()]
    for record, one in zip(records, written["expressions"], strict=True):
        assert {**record, "id": 0} == {**one["prediction"], "id": 0}


def test_a_large_photo_is_decoded_as_asked(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is that of predict with the same option, and the option changes it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (800, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save("large.jpg")
    asked = ["large.jpg", "-e", "the star", "--model", str(model_folder), "--device", "cpu"]
    answers = []
    for number, more in enumerate(([], ["--full-decode"])):
        explained, predicted = Path(f"explained{number}"), Path(f"predicted{number}")
        assert main(["explain", *asked, *more, "--json", "-o", str(explained)]) == 0
        assert main(["predict", *asked, *more, "--save", "none", "-o", str(predicted)]) == 0
        (one,) = json.loads((explained / "explain.json").read_text())["expressions"]
        record = json.loads((predicted / "predictions.jsonl").read_text())
        assert {**record, "id": 0} == {**one["prediction"], "id": 0}
        answers.append(record)
    assert answers[0] != answers[1]


def test_raw_maps_are_documented_arrays(run: Call, model_folder: Path, repo: Path) -> None:
    from risam_cli.api.model import load

    assert run("-e", cases.TEXT, "--json", "--point", "50,20", "--point", "0,0", "--head", "1") == 0
    written = json.loads(Path("out/explain.json").read_text())
    (one,) = written["expressions"]
    found = load(model_folder, device="cpu").encode("a.png").attention(cases.TEXT)
    for name in ("regions_of_token", "padding", "tokens_of_region"):
        stored = np.array(one[name], np.float32)
        assert (stored == getattr(found, name)).all(), name
    assert [word["text"] for word in one["words"]] == [word.text for word in found.words]
    assert [word["tokens"] for word in one["words"]] == [list(word.tokens) for word in found.words]
    heard = found.words_of_regions(head=1)
    assert heard is not None
    for point, (row, column) in zip(one["points"], ((1, 3), (0, 0)), strict=True):
        assert (point["row"], point["column"]) == (row, column)
        assert np.array_equal(np.array(point["words"], np.float32), heard[row, column])
    page = (repo / "docs/explain.md").read_text(encoding="utf-8")
    fields = {*written, *one, *one["words"][0], *one["points"][0]}
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []


def test_an_output_that_is_there_is_refused(
    run: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("-e", "the star", "-e", "the ring") == 0
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert run("-e", "the ring") == 1
    assert "out is not empty; choose another -o or give --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert run("-e", "the ring", "--overwrite") == 0
    left = {path.name for path in Path("out").iterdir()}
    assert left == {"0-the-ring.png", "explain.html", "export.json", "mine.txt"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Missing option '-e'"),
        (["-e", " "], 2, "the expression ' ' has no words"),
        (["-e", "star", "--point", "7"], 2, "'7' is not X,Y in pixels"),
        (["-e", "star", "--point", "nan,7"], 2, "'nan,7' is not X,Y in pixels"),
        (["-e", "star", "--point", "60,7"], 2, "60,7 is not in the image of 60x30 pixels"),
        (["-e", "star", "--block", "1"], 2, "block 1: the model 'small' has 1 blocks"),
        (["-e", "star", "--head", "2"], 2, "head 2: the model 'small' has 2 heads"),
        (["-e", "star", "--grid", "0"], 2, "0 is not in the range"),
    ],
)
def test_wrong_usage_is_told_and_writes_nothing(
    run: Call, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert run(*arguments) == code
    assert says in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_bad_image_is_told_before_a_model_is_loaded(
    run: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("a.png").write_bytes(b"")
    assert run("-e", "star", model=tmp_path / "no-model") == 1
    assert "a.png: the file is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": {"vision_guided": False}},
        {"fusion": {"language_guided": False}},
        {"kind": "sam"},
    ],
    ids=["no-vga", "no-lga", "sam"],
)
def test_the_command_on_ablated_models(
    run: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = merge(SMALL, changes)
    if "kind" in changes:
        values = merge(values, {"fusion": {"dim": 32}})
    settings = small_settings(**values)
    text = new_text_parts(settings.text_encoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(settings, text)
    folder = tmp_path / "ablated"
    own = settings.model_dump(), text.config.to_dict(), text.tokenizer.to_json()
    write_model_folder(folder, model.state_dict(), *own, {"name": "ablated"}, "For a test.\n")
    assert run("-e", "the star", "--json", "--point", "3,3", model=folder) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 1
    assert "this model has no" in told[0]
    page = Path("out/explain.html").read_text(encoding="utf-8")
    assert told[0].removeprefix("warning: ") in page
    written = json.loads(Path("out/explain.json").read_text())
    assert written["missing"] == [told[0].removeprefix("warning: ")]
    one = written["expressions"][0]
    lost = {name for name in ("regions_of_token", "tokens_of_region") if one[name] is None}
    expected = {
        "fusion": {"tokens_of_region"} if "vision_guided" in str(changes) else {"regions_of_token"},
        "kind": {"regions_of_token", "tokens_of_region"},
    }
    assert lost == expected[next(iter(changes))]


def test_several_images_have_a_page_each_and_one_that_leads_to_them(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        Image.fromarray(cases.noise_image()).save(photos / name)
    (photos / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    asked = ["explain", str(photos), "-e", "the star", "-o", str(out), "--device", "cpu"]
    assert main([*asked, "--model", str(model_folder)]) == 3
    assert "2 images explained" in capsys.readouterr().err
    index = (out / "index.html").read_text(encoding="utf-8")
    for place in ("images/a", "images/sub/a"):
        assert f'href="{place}/explain.html"' in index
        assert f">{place.removeprefix('images/')}.png<" in index  # from the common folder
        made = {path.name for path in (out / place).iterdir() if path.is_file()}
        assert made == {"0-the-star.png", "explain.html"}
    (failure,) = [json.loads(line) for line in (out / "failures.jsonl").open()]
    assert failure["image"].endswith("bad.png")
    assert "<h1>a.png</h1>" in (out / "images/a/explain.html").read_text(encoding="utf-8")


def test_each_image_is_explained_once_however_it_is_named(
    run: Call, explain_alone: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mix/b.png", "mix/c.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(cases.noise_image()).save(name)
    assert run("mix/../a.png", "mix/b.png", "./mix//b.png", "-e", "the star") == 0
    assert "2 images explained" in capsys.readouterr().err
    for _ in range(2):  # a pattern alone, of several images and of one
        assert explain_alone("mix/*.png", "--overwrite") == 0
        count = len(list(Path("mix").glob("*.png")))
        assert f"{count} image{'' if count == 1 else 's'} explained" in capsys.readouterr().err
        Path("mix/c.png").unlink(missing_ok=True)


def test_what_one_image_lacks_does_not_end_the_others(
    run: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(cases.noise_image(20, 20)).save("small.png")
    for wrong in (("--block", "7"), ("--head", "2")):
        assert run("small.png", "-e", "the star", *wrong) == 2
        assert not Path("out").exists()
    capsys.readouterr()
    assert run("small.png", "-e", "the star", "--point", "50,20") == 3
    assert "1 image explained" in capsys.readouterr().err
    assert json.loads(Path("out/export.json").read_text())["complete"] is True
    assert Path("out/images/a/explain.html").is_file()
    failure = json.loads(Path("out/failures.jsonl").read_text())
    assert failure["image"] == "small.png"
    assert "the point 50,20 is not in the image of 20x20 pixels" in failure["message"]


def test_an_image_that_the_network_fails_at_does_not_end_the_others(
    run: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(cases.noise_image(20, 20)).save("small.png")
    ask = Session.ask

    def fails_at_small(session: Session, encoded: Encoded, *rest: Any) -> Any:
        if encoded.image.size == (20, 20):
            raise ModelError("the network failed: odd shapes")
        return ask(session, encoded, *rest)

    monkeypatch.setattr(Session, "ask", fails_at_small)
    assert run("small.png", "-e", "the star") == 3
    assert "1 image explained" in capsys.readouterr().err
    assert Path("out/images/a/explain.html").is_file()
    failure = json.loads(Path("out/failures.jsonl").read_text())
    assert (failure["image"], failure["stage"]) == ("small.png", "predict")
    assert failure["message"] == "small.png: the network failed: odd shapes"


def test_broken_lines_and_expressions_of_a_manifest_are_told(
    explain_alone: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lists").mkdir()
    Image.fromarray(cases.noise_image()).save("lists/b.png")
    rows = ['{"image": "b.png", "expression": "its own"}', '{"image": ', '{"image": "b.png"}']
    Path("lists/all.jsonl").write_text("\n".join(rows) + "\n")
    assert explain_alone("lists/all.jsonl") == 3
    told = capsys.readouterr().err
    assert "1 image has expressions of their own, which are not explained" in told
    assert "1 image explained" in told
    assert Path("out/images/b/0-the-star.png").is_file()
    failure = json.loads(Path("out/failures.jsonl").read_text())
    assert "lists/all.jsonl, line 2" in failure["message"]
    Path("lists/all.jsonl").write_text(rows[1] + "\n")
    assert explain_alone("lists/all.jsonl", "--overwrite") == 1
    assert "there is no image; the first failure: lists/all.jsonl" in capsys.readouterr().err


def test_what_is_told_of_an_explanation_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    from risam_cli.api.model import load

    Image.fromarray(cases.noise_image()).save(tmp_path / "a.png")
    encoded = load(model_folder, device="cpu").encode(tmp_path / "a.png")
    found = encoded.explain(["the star", "the ring"])
    assert repr(found) == (
        f"<ExplanationResult of 'the star', 'the ring' in {str(tmp_path / 'a.png')!r}>"
    )
    assert "\n" not in repr(encoded.attention("the star"))


def test_the_telling_word_is_the_most_gathered_one_that_means_something() -> None:
    texts = ("[CLS]", "the", "red", "wobbly", "star")
    gathered = (0.99, 0.9, 0.5, 0.8, 0.3)  # the weight of one region, the others share the rest
    maps = np.zeros((1, 1, 5, 2, 2), np.float32)
    for k, weight in enumerate(gathered):
        maps[0, 0, k] = (1 - weight) / 3
        maps[0, 0, k, 0, 0] = weight
    words = tuple(
        Word(text, (k,), special=text == "[CLS]", unknown=text == "wobbly")
        for k, text in enumerate(texts)
    )
    padding = np.zeros((1, 1, 5), np.float32)
    attention = Attention(
        "the red wobbly star", texts, words, (30, 60), 4, (2, 2), maps, padding, None
    )
    assert cases.explanation_of(attention).expressions[0].telling_word() == 2
    # Where there is nothing else, an article is lit.
    alone = replace(attention, words=words[:2], tokens=texts[:2], regions_of_token=maps[:, :, :2])
    assert cases.explanation_of(alone).expressions[0].telling_word() == 1
    without = replace(attention, regions_of_token=None, padding=None)
    assert cases.explanation_of(without).expressions[0].telling_word() is None
