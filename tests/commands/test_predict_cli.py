"""risam predict as a process: its contract, its bad inputs, and kills."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.paths import REPO
from support.records import read_records

from risam_cli.cli import main
from risam_cli.masks import rle as masks

Call = Callable[..., int]


@pytest.fixture
def predict(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """``risam predict`` in this process, with a small model, into ``out``; gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, model: str | Path = model_folder, stdin: str = "") -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        where = [] if "-o" in arguments else ["-o", "out"]
        device = [] if "--device" in arguments else ["--device", "cpu"]
        return main(["predict", *map(str, arguments), *where, "--model", str(model), *device])

    return call


def records(folder: str | Path = "out") -> list[dict[str, Any]]:
    lines = (Path(folder) / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def failures(folder: str | Path = "out") -> list[dict[str, Any]]:
    lines = (Path(folder) / "failures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("*s.jsonl"), *folder.glob("masks/**/*.png")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


# --- what a user gets -----------------------------------------------------------------------------


def test_a_folder_and_a_phrase(predict: Call, tiny_images: Path) -> None:
    assert predict(tiny_images, "-e", "the red circle", "-e", "the star") == 0
    found = records()
    assert len(found) == 12
    assert [record["id"] for record in found][:2] == [f"{tiny_images}/a.png#{k}" for k in (0, 1)]
    for record in found:
        with Image.open(record["image"]) as image:
            assert (record["width"], record["height"]) == image.size
        with Image.open(Path("out") / record["mask"]) as mask:
            drawn = np.asarray(mask)
        assert (drawn == 255 * masks.decode(record["segmentation"])).all()
        assert drawn.sum() // 255 == record["area"]
        assert 0 <= record["score"] <= 1
    assert not failures()
    assert len(list(Path("out").rglob("*.png"))) == 12


def test_all_kinds_of_inputs_mixed(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tiny_images / "m.jsonl").write_text('{"image": "a.png", "expression": "square", "id": 9}\n')
    (tiny_images / "m.csv").write_text("image,expression\nb.jpg,star\nb.jpg,ring\n")
    (tiny_images / "m.tsv").write_text("expression\timage\ncross\tc.png\n")
    coco = {
        "images": [{"id": 1, "file_name": "d.webp", "height": 50, "width": 20}],
        "annotations": [],
        "expressions": [{"id": 77, "image_id": 1, "text": "the dog", "ann_ids": []}],
    }
    (tiny_images / "m.json").write_text(json.dumps(coco))
    line = json.dumps({"image": str(tiny_images / "sub" / "e.bmp"), "expressions": ["a", "b"]})
    inputs = [tiny_images / "sub", *(tiny_images / f"m.{kind}" for kind in ("jsonl", "csv", "tsv"))]
    inputs += [tiny_images / "m.json", tiny_images / "[ab].*"]
    assert predict(*inputs, "-", "-e", "it", "--jsonl", "-", stdin=line) == 0
    out = capfd.readouterr().out
    assert out == Path("out/predictions.jsonl").read_text()
    assert [record["id"].removeprefix(f"{tiny_images}/") for record in records()] == [
        *("sub/a.png#0", "sub/e.bmp#0"),
        *("9", "b.jpg#0", "b.jpg#1", "c.png#0", "77"),
        *("a.png#0", "b.jpg#0", "sub/e.bmp#1", "sub/e.bmp#2"),
    ]


def test_expressions_from_a_file_and_the_command_line(predict: Call, tiny_images: Path) -> None:
    Path("e.txt").write_text("the star\n\nthe ring\n")
    assert predict(tiny_images / "a.png", "-e", "first", "--expressions", "e.txt") == 0
    assert [record["expression"] for record in records()] == ["first", "the star", "the ring"]


def test_a_long_expression_is_cut_and_the_record_says_so(predict: Call, tiny_images: Path) -> None:
    assert predict(tiny_images / "a.png", "-e", "the red circle " * 60) == 0
    (record,) = records()
    assert re.fullmatch(r"expression cut to \d+ tokens", record["notes"][0])
    assert record["expression"] == "the red circle " * 60


def test_thresholds_reach_the_network(predict: Call, tiny_images: Path) -> None:
    image = tiny_images / "b.jpg"
    low, high = ["--no-target-threshold", "1"], ["--no-target-threshold", "0"]
    assert predict(image, "-e", "x", "--threshold", "0", *low, "-o", "all") == 0
    assert predict(image, "-e", "x", "--threshold", "1", *low, "-o", "none") == 0
    assert predict(image, "-e", "x", *high, "-o", "nothing") == 0
    assert records("all")[0]["area"] == 48 * 64
    assert records("none")[0]["area"] == 0
    assert not records("none")[0]["no_target"]
    nothing = records("nothing")[0]
    assert nothing["no_target"]
    assert (nothing["area"], nothing["bbox"]) == (0, [0, 0, 0, 0])


def test_workers_and_batches_do_not_change_a_byte(predict: Call, tiny_images: Path) -> None:
    assert predict(tiny_images, "-e", "the star", "-e", "the small ring", "-o", "a") == 0
    more = ["--workers", "2", "--batch-size", "3"]
    assert predict(tiny_images, "-e", "the star", "-e", "the small ring", "-o", "b", *more) == 0
    assert contents(Path("a")) == contents(Path("b"))


def test_overlays(predict: Call, tiny_images: Path) -> None:
    assert predict(tiny_images, "-e", "x", "-e", "y", "--save", "png,overlay") == 0
    assert len(list(Path("out/overlays").rglob("*.png"))) == 6
    assert len(list(Path("out/masks").rglob("*.png"))) == 12


# --- going on -------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_resumed_or_begun_anew(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_images, "-e", "x", "--limit", "2") == 0
    first = Path("out/predictions.jsonl").read_bytes()
    assert predict(tiny_images, "-e", "x") == 1
    assert "holds another run; continue it with --resume" in capfd.readouterr().err
    assert Path("out/predictions.jsonl").read_bytes() == first
    assert predict(tiny_images, "-e", "x", "--resume", "--jsonl", "-") == 0
    assert capfd.readouterr().out == Path("out/predictions.jsonl").read_text()
    assert Path("out/predictions.jsonl").read_bytes().startswith(first)
    assert predict(tiny_images, "-e", "y", "--resume") == 1
    assert "the images or expressions changed" in capfd.readouterr().err
    assert predict(tiny_images, "-e", "x", "--threshold", "0.3", "--resume") == 1
    assert "threshold was 0.5, is 0.3" in capfd.readouterr().err
    assert predict(tiny_images, "-e", "y", "--overwrite") == 0
    assert {record["expression"] for record in records()} == {"y"}
    assert predict(tiny_images, "-e", "y", "--resume", "--overwrite") == 2
    assert predict(tiny_images, "-e", "y", "--retry-failed", "--overwrite") == 2
    assert predict(tiny_images, "-e", "y", "-o", "new", "--resume") == 0  # nothing yet: begins


def test_what_failed_is_tried_again_on_demand(predict: Call, tiny_images: Path) -> None:
    whole = (tiny_images / "b.jpg").read_bytes()
    (tiny_images / "b.jpg").write_bytes(whole[:200])
    assert predict(tiny_images, "-e", "x") == 3
    assert len(failures()) == 1
    (tiny_images / "b.jpg").write_bytes(whole)
    assert predict(tiny_images, "-e", "x", "--retry-failed") == 0
    assert predict(tiny_images, "-e", "x", "-o", "fresh") == 0
    assert contents(Path("out")) == contents(Path("fresh"))


def test_what_was_asked_need_not_be_typed_again(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (tiny_images / "b.jpg").read_bytes()
    (tiny_images / "b.jpg").write_bytes(whole[:200])
    Path("asked.txt").write_text("the star\n")
    asked = ("-e", "the ring", "--expressions", "asked.txt")
    assert predict(tiny_images, *asked) == 3
    before = contents(Path("out"))
    (tiny_images / "b.jpg").write_bytes(whole)
    capfd.readouterr()
    # Others than were asked would throw everything away: one line says which, and how.
    for given, told in (
        (["the ring"], "leaves out 'the star'"),
        (["the star", "the ring", "a cup"], "adds 'a cup'"),
        (["a cup"], "leaves out 'the ring', 'the star' and adds 'a cup'"),
    ):
        code = predict(tiny_images, *(f"-e{text}" for text in given), "--retry-failed")
        said = capfd.readouterr().err
        assert code == 2
        assert f"--retry-failed {told}, unlike the run in out; leave out -e" in said
    assert contents(Path("out")) == before
    assert predict(tiny_images, "--retry-failed") == 0
    assert (
        "using the expressions of the run in out: 'the ring', 'the star'\n"
        in capfd.readouterr().err
    )
    assert predict(tiny_images, *asked, "-o", "fresh") == 0
    assert contents(Path("out")) == contents(Path("fresh"))
    # In another order, and where --resume leaves them out.
    assert predict(tiny_images, "-ethe star", "-ethe ring", "--retry-failed") == 0
    assert predict(tiny_images, "--resume") == 0
    assert contents(Path("out")) == contents(Path("fresh"))
    # What run.json does not tell has to be typed.
    Path("out/run.json").write_text('{"inputs": {"expressions": [1]}}')
    assert predict(tiny_images, "--retry-failed") == 2
    assert "no expression is given" in capfd.readouterr().err


def test_failures_are_told_once_and_more_only_where_there_are_more(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.jpg", "c.png"):
        (tiny_images / name).write_bytes(b"")
    phrases = [f"-e{number}" for number in range(7)]
    assert predict(tiny_images, *phrases) == 3
    said = capfd.readouterr().err
    warned = [line for line in said.splitlines() if "0 bytes" in line]
    assert [sum(name in line for line in warned) for name in ("b.jpg", "c.png")] == [1, 1]
    assert "more items failed" not in said
    assert "14 items failed: see out/failures.jsonl" in said
    for number in range(4):
        (tiny_images / f"{number}.png").write_bytes(b"")
    assert predict(tiny_images, *phrases, "-o", "more") == 3
    said = capfd.readouterr().err
    assert sum("0 bytes" in line for line in said.splitlines()) == 5
    assert said.count("more items failed; all are in more/failures.jsonl") == 1


def test_failures_over_the_limit_stop_the_run(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.jpg", "c.png"):
        (tiny_images / name).write_text("broken")
    assert predict(tiny_images, "-e", "x", "--max-failures", "0") == 1
    assert "--max-failures 0; finished work is kept" in capfd.readouterr().err
    assert predict(tiny_images, "-e", "x", "--resume") == 3
    assert len(records()) == 4


def test_kills_lose_nothing_and_double_nothing(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(50):
        picture = rng.integers(0, 256, (40 + number, 90, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02}.jpg")
    (folder / "13.jpg").write_text("broken")
    out = tmp_path / "out"
    arguments = [out, folder, "-e", "the red circle", "-e", "the star"]
    driver = REPO / "tests" / "support" / "kill_predict.py"
    done = subprocess.run(
        [sys.executable, driver, "1", "8", model_folder, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    codes = json.loads(done.stdout)
    assert codes[0] == codes[-1] == 3, done.stderr
    assert set(codes) <= {None, 3, 130}, done.stderr
    assert sum(code != 3 for code in codes) >= 4, "hardly any try was cut off"
    assert contents(out) == contents(tmp_path / "out-whole")
    assert len(read_records(out)) == 98


def test_a_reader_of_the_stream_that_leaves(model_folder: Path, tiny_images: Path) -> None:
    out = tiny_images / "out"
    arguments = ["predict", tiny_images, "-e", "x", "-o", out, "--jsonl", "-", "--model"]
    command = [sys.executable, "-m", "risam_cli", *map(str, arguments), str(model_folder)]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "-", *command],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 1
    assert "the reader of stdout is gone; finished work is kept" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_run_holds_no_lock(predict: Call, tiny_images: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; "
            "from risam_cli.runs.folder import RunFolder; "
            "f = RunFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)",
            tmp_path / "out",
        ],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert predict(tiny_images / "a.png", "-e", "x") == 1
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert predict(tiny_images / "a.png", "-e", "x") == 0


# --- wrong usage, bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["a.png"], 2, "no expression is given"),
        (["a.png", "-e", ""], 2, "the expression '' has no words"),
        (["a.png", "-e", "?!"], 2, "the expression '?!' has no words"),
        (["a.png", "-e", "x" * 10_001], 2, "has 10001 characters; give 10000 or fewer"),
        ([], 2, "INPUTS"),
        (["a.png", "", "-e", "x"], 2, "an input is empty"),
        (["a.png", "-e", "x", "--save", "pdf"], 2, "png, overlay, html and none"),
        (["a.png", "-e", "x", "--save", "none,png"], 2, "none goes with nothing else"),
        (["a.png", "-e", "x", "--jsonl", "x.jsonl"], 2, "only -"),
        (["a.png", "-e", "x", "--shard", "5/4"], 2, "I/N"),
        (["a.png", "-e", "x", "--device", "cuda:99"], 2, "GPU"),
        (["a.png", "-e", "x", "--threshold", "2"], 2, "0 to 1"),
        (["a.png", "-e", "x", "--image-timeout", "nan"], 2, "nan is not a number of seconds"),
        (["a.png", "-e", "x", "--image-timeout", "inf"], 2, "inf is not a number of seconds"),
        (["-", "-", "-e", "x"], 2, "named twice"),
        (["a.png", "-e", "x", "--expressions", "gone.txt"], 1, "gone.txt"),
        (["nothing", "-e", "x"], 1, "no such file or folder"),
        (["*.tiff", "-e", "x"], 1, "matches no file"),
        (["list.json", "-e", "x"], 1, "list.json"),
        (["a.png", "-e", "x", "-o", "a.png"], 2, "a.png"),
        (["a.png", "-e", "x", "-o", "a.png/below"], 1, "a.png"),
        ([".", "-e", "x", "-o", "."], 2, "also the input folder"),
        (["a.png", "-e", "x", "--image-root", "gone"], 2, "gone"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    predict: Call, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    Path("list.json").write_text('{"images": 7}')
    assert predict(*arguments) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert text in said.err
    assert "Traceback" not in said.err
    assert len([line for line in said.err.splitlines() if line.startswith(("error", "Error"))]) == 1
    assert not Path("out").exists()


def test_a_model_that_is_damaged_is_told_before_anything_is_written(
    predict: Call, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    for spoil in (
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model": 5}'),
        shutil.rmtree,
    ):
        shutil.rmtree("broken", ignore_errors=True)
        shutil.copytree(model_folder, "broken")
        spoil(Path("broken"))
        assert predict("a.png", "-e", "x", model="broken") == 1
        said = capfd.readouterr().err
        assert "broken" in said
        assert "Traceback" not in said
        assert len(said.splitlines()) == 1
        assert not Path("out").exists()


def bad_images(folder: Path) -> dict[str, str]:
    """Every kind of bad image, with what its row must say."""
    folder.mkdir()
    jpeg = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG")
    (folder / "bad_empty.jpg").write_bytes(b"")
    (folder / "bad_text.jpg").write_text("a shopping list\n")
    (folder / "bad_cut.jpg").write_bytes(jpeg.getvalue()[:900])
    (folder / "bad_noise.png").write_bytes(bytes(range(256)))
    (folder / "bad_link.jpg").symlink_to(folder / "nothing.jpg")
    os.mkfifo(folder / "bad_pipe.jpg")
    Image.new("1", (40_000, 5_000)).save(folder / "bad_huge.png")
    (folder / "good_a.jpg").write_bytes(jpeg.getvalue())
    (folder / "good\nb.jpg").write_bytes(jpeg.getvalue())
    return {
        "bad_empty.jpg": "0 bytes",
        "bad_text.jpg": "holds text",
        "bad_cut.jpg": "truncated",
        "bad_noise.png": "not an image",
        "bad_link.jpg": "no such file",
        "bad_pipe.jpg": "not a regular file",
        "bad_huge.png": "200000000 pixels are more than 178956970",
    }


def test_every_bad_image_is_a_row_and_the_rest_is_done(
    predict: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = bad_images(Path("in"))
    assert predict("in", "-e", "the star") == 3
    rows = failures()
    assert sorted(Path(row["image"]).name for row in rows) == sorted(expected)
    for row in rows:
        assert expected[Path(row["image"]).name] in row["message"]
        assert row["stage"] == "decode"
        assert row["id"] == f"{row['image']}#0"
        assert row["expression"] == "the star"
    assert [record["image"] for record in records()] == ["in/good\nb.jpg", "in/good_a.jpg"]
    said = capfd.readouterr().err
    assert "7 items failed: see out/failures.jsonl" in said
    assert "Traceback" not in said
    assert json.loads(Path("out/run.json").read_text())["counts"]["failures"] == 7


def test_terminal_codes_in_names_are_shown_not_obeyed(
    predict: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("\x1b[31mred.jpg").write_text("no image")
    assert predict("\x1b[31mred.jpg", "-e", "\x1b]0;title\x07") == 3
    said = capfd.readouterr()
    assert "\x1b" not in said.err
    assert "\\x1b[31mred.jpg" in said.err


def test_a_manifest_that_is_hostile_writes_nowhere_else(predict: Call, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    Image.new("RGB", (9, 9)).save(inside / "a.png")
    shutil.copy(inside / "a.png", tmp_path / "outside.png")
    lines: list[Any] = [
        {"image": "../outside.png", "expression": "x"},
        {"image": str(tmp_path / "outside.png"), "expression": "x"},
        {"image": "sub/../a.png", "expression": "../../../../escape"},
        {"image": "./a.png", "expression": "x", "id": "../../escape"},
        {"image": "a.png", "expression": "x\0y\nz"},
        {"image": "a.png\0", "expression": "x"},
    ]
    (inside / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (inside / "sub").mkdir()
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    within = ["sub/../a.png", "./a.png", "a.png"]
    outside = ["../outside.png", str(tmp_path / "outside.png")]
    for options, names in (((), outside + within), (("--confine", "--overwrite"), within)):
        assert predict(inside / "m.jsonl", *options) == 3
        after = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in [p, *p.parents]}
        assert after == {path for path in before if tmp_path / "out" not in [path, *path.parents]}
        assert [record["image"] for record in records()] == names
        for record in records():
            assert (Path("out") / record["mask"]).is_file()
            assert ".." not in Path(record["mask"]).parts
        assert len(failures()) == 6 - len(names)


# --- looking first --------------------------------------------------------------------------------


def test_a_dry_run_reads_everything_and_writes_nothing(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_images, "-e", "x", "-e", "y", "--dry-run", model="none/such") == 0
    out = capfd.readouterr().out
    assert "6 images, 12 records to make, 0 that would fail" in out
    assert f"{tiny_images}/a.png (40x30): 'x', 'y'" in out
    assert not Path("out").exists()
    expected = bad_images(Path("in"))
    assert predict("in", "-e", "x", "--dry-run") == 3
    out = capfd.readouterr().out
    # What is behind the header is not read, so a file that is cut there passes.
    for name, text in expected.items():
        assert (text in out) is (name != "bad_cut.jpg")
    assert "3 images" not in out
    assert "9 images, 3 records to make, 6 that would fail" in out


def test_of_an_empty_list_a_dry_run_says_what_the_run_says(
    predict: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").touch()
    for more in (["--dry-run"], []):
        assert predict("empty.jsonl", *more) == 0
        assert "warning: the inputs contain no image" in capfd.readouterr().err


def test_a_dry_run_counts_what_is_done(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tiny_images / "b.jpg").write_bytes(b"")
    phrases = ("-e", "x", "-e", "y")

    def told(*more: str) -> str:
        capfd.readouterr()
        assert predict(tiny_images, *phrases, "--dry-run", *more) == 3
        return capfd.readouterr().out.splitlines()[-1]

    plain = "6 images, 10 records to make, 2 that would fail; output: out"
    assert told("--resume") == plain
    assert predict(tiny_images, *phrases, "--limit", "3") == 3
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    left = "3 images, 6 records to make, 0 that would fail, 4 done already"
    assert told("--resume") == (f"{left}, 2 that failed before and are not retried; output: out")
    assert told("--retry-failed") == (
        "4 images, 6 records to make, 2 that would fail, 4 done already; output: out"
    )
    assert told() == f"{plain} (holds a run already)"
    # An image that was added in front moves the others.
    (tiny_images / "0.png").write_bytes((tiny_images / "a.png").read_bytes())
    assert "4 images, 8 records to make, 0 that would fail, 4 done" in told("--resume")
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before
    (tiny_images / "b.jpg").unlink()
    assert predict(tiny_images, *phrases, "--resume") == 0
    capfd.readouterr()
    assert predict(tiny_images, "--dry-run", "--resume") == 0
    said = capfd.readouterr()
    assert (
        said.out == "0 images, 0 records to make, 0 that would fail, 12 done already; output: out\n"
    )
    assert "using the expressions of the run in out: 'x', 'y'" in said.err


def test_a_dry_run_keeps_stdout_for_records(
    predict: Call, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_images, "-e", "x", "--dry-run", "--jsonl", "-") == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert "6 images" in said.err


def test_a_dry_run_and_help_import_no_torch(tiny_images: Path) -> None:
    code = (
        "import sys; from risam_cli.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(99 if heavy else code)"
    )
    for arguments in (["--help"], [str(tiny_images), "-e", "x", "--dry-run"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "predict", *arguments],
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.photos
def test_real_photos(predict: Call, photos: Path) -> None:
    assert predict(photos, "-e", "the person", "--limit", "10") == 0
    assert len(records()) == 10
    coco = photos.parent / "instances.json"
    assert predict(coco, "--image-root", photos, "--limit", "5", "-o", "coco") == 0
    data = json.loads(coco.read_text())
    by_image = {one["id"]: [] for one in data["images"][:5]}
    for one in data["expressions"]:
        by_image.get(one["image_id"], []).append(str(one["id"]))
    wanted = [name for names in by_image.values() for name in names]
    assert [record["id"] for record in records("coco")] == wanted
