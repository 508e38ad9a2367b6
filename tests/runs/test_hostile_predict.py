"""The command line as a process, over every hostile image, name and manifest line at once."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support import hostile_images
from support.cli import Cli

from risam_cli import cli as entry
from risam_cli.data.images.images import open_rgb
from risam_cli.data.inputs.inputs import MAX_CHARACTERS
from risam_cli.data.inputs.walk import match_pattern
from risam_cli.errors import ImageError, OutputError

ESCAPES = "\x1b]0;owned\x07\x1b[31m\x1b[2J"
HTML = "<script>window.owned=1</script><img src=x onerror=window.owned=1>"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _outside(root: Path, *known: Path) -> set[str]:
    """Everything under a folder but what is under the ones that are known."""
    found = (path for path in root.rglob("*") if not path.is_symlink())
    return {str(p) for p in found if not any(p.is_relative_to(k) for k in known)}


def test_every_hostile_image_costs_a_row_at_most(
    cli: Cli, tmp_path: Path, model_folder: Path
) -> None:
    expected = hostile_images.plant(tmp_path / "in")
    before = _outside(tmp_path, tmp_path / "out")
    out = tmp_path / "out"
    options = ["-e", f"{HTML}{ESCAPES}", "--save", "png,overlay", "--model", model_folder]
    done = cli("predict", tmp_path / "in", *options, "-o", out)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not {c for c in done.stderr if c < " " and c != "\n"}
    assert "samples per pixel" not in done.stderr  # Pillow's own words
    records = {os.path.basename(row["image"]) for row in _rows(out / "predictions.jsonl")}
    failed = {os.path.basename(row["image"]) for row in _rows(out / "failures.jsonl")}
    assert records == {name for name, good in expected.items() if good}
    assert failed == {name for name, good in expected.items() if not good} | {
        "circle-a.png",
        "circle-b.png",
    }
    assert "skipped: 3 linked folders" in done.stderr
    assert "skipped: 2 links that lead out of the folder" in done.stderr
    assert _outside(tmp_path, out) == before
    masks = [p.relative_to(out).as_posix() for p in (out / "masks").rglob("*.png")]
    assert len({name.casefold() for name in masks}) == len(records)
    assert all(name.isprintable() and ".." not in name.split("/") for name in masks)


def _manifest(root: Path) -> list[tuple[bytes, bool]]:
    """Lines, and whether a mask may come of each."""

    def line(**row: Any) -> bytes:
        return json.dumps({"image": "a.png", **row}).encode()

    return [
        (line(expression="red circle"), True),
        (line(image="../secret.png", expression="x"), False),
        (line(image="../../../../etc/passwd", expression="x"), False),
        (line(image=str(root / "secret.png"), expression="x"), False),
        (line(image="/dev/zero", expression="x"), False),
        (line(image="a.png\0.jpg", expression="x"), False),
        (line(image="a\nb.png", expression="x"), False),
        (line(image="n" * 5000 + ".png", expression="x"), False),
        (line(image=f"{ESCAPES}.png", expression="x"), False),
        (line(image="pipe.png", expression="x"), False),
        (line(image={"a": 1}, expression="x"), False),
        (line(image="", expression="x"), False),
        (line(expression=f"{ESCAPES}{HTML}"), True),
        (line(expression="\ud800"), False),
        (line(expression="\u202egnp.exe"), True),
        (line(expression=" "), False),
        (line(expression="x " * MAX_CHARACTERS), False),
        (line(expression="x", id=f"{ESCAPES}../../../etc/cron.d/x"), True),
        (line(expression="x", id="../../masks/../../up"), True),
        (line(expression="y", id=float("nan")), False),
        (line(expression="y", id=float("inf")), False),
        (line(expression="y", id=[1]), False),
        (line(expressions={"a": 1}), False),
        (line(expressions=[1, None]), False),
        (b'{"image": "a.png", "expression": "y", "id": ' + b"9" * 5000 + b"}", False),
        (b'{"image": "a.png", "image": "b.png", "expression": "doubled key"}', False),
        (b"[" * 100_000, False),
        (b'{"image":' * 100_000, False),
        (b"\xff\xfe", False),
        (b"\0", False),
        (b"null", False),
        (b'{"image": "a.png", "expression": "' + b"x" * (17 << 20) + b'"}', False),
    ]


def test_every_hostile_line_costs_a_row_at_most(
    cli: Cli, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(hostile_images.saved("PNG"))
    (tmp_path / "secret.png").write_bytes(hostile_images.saved("PNG"))
    os.mkfifo(folder / "pipe.png")
    lines = _manifest(tmp_path)
    (folder / "m.jsonl").write_bytes(b"\n".join(line for line, _ in lines))
    before = _outside(tmp_path, tmp_path / "out")
    options = ["--save", "png,overlay", "--model", model_folder, "-o", tmp_path / "out"]
    done = cli("predict", folder / "m.jsonl", "--confine", "--jsonl", "-", *options)
    assert done.returncode == 3, done.stderr
    assert "internal error" not in done.stderr
    assert not {c for c in done.stdout + done.stderr if c < " " and c != "\n"}
    good = sum(fine for _, fine in lines)
    assert len(_rows(tmp_path / "out/predictions.jsonl")) == len(done.stdout.splitlines()) == good
    assert len(_rows(tmp_path / "out/failures.jsonl")) == len(lines) - good
    assert _outside(tmp_path, tmp_path / "out") == before
    assert len(list((tmp_path / "out/masks").iterdir())) == good


def test_tables_of_every_kind_are_read_or_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_bytes(hostile_images.saved("PNG"))
    tables = {
        "open-quote.csv": b'image,expression\na.png,"never closed\n' + b"x" * 300_000,
        "open-quote-few.csv": b'image,expression\na.png,x\na.png,"y\na.png,z\n',
        "nul.csv": b"image,expression\na.png,\0\n",
        "formula.csv": b"image,expression\n=cmd|' /C calc'!A0,x\n",
        "latin.tsv": b"image\texpression\na.png\t\xe9\n",
        "no-header.csv": b"",
        "one-line.csv": b"x" * (20 << 20),
        "wide.csv": b"image,expression" + b",x" * 100_000 + b"\n",
        "deep.json": b"[" * 200_000,
        "bytes.json": bytes(range(256)),
        "digits.json": b'{"images": [{"id": ' + b"9" * 5000,
    }
    for name, data in tables.items():
        (tmp_path / name).write_bytes(data)
        code = entry.main(["predict", str(tmp_path / name), "--dry-run"])
        err = capsys.readouterr().err
        # wide.csv holds no line below its header, which is a list of nothing.
        assert code in ((0, 1, 3) if name in ("nul.csv", "wide.csv") else (1, 3)), (name, err)
        assert "internal error" not in err, name


def test_a_pattern_follows_no_linked_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """Two links to the folder that they are in would make 2^40 paths."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "x/a.png", "x/y/b.png", "x/.hidden/c.png", "x/[z]/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("one", "two", "x/three"):
        (tmp_path / name).symlink_to(tmp_path)
    started = time.perf_counter()
    every = ["a.png", "x/[z]/d.png", "x/a.png", "x/y/b.png"]
    assert match_pattern("**/*.png") == every
    assert match_pattern("**/**/*.png") == every
    assert match_pattern("x/**/*.png") == every[1:]
    assert match_pattern("./**/a.png") == ["./a.png", "./x/a.png"]
    assert match_pattern(f"{tmp_path}/x/**/b.png") == [f"{tmp_path}/x/y/b.png"]
    assert match_pattern("*/y/*.png") == ["x/y/b.png"]
    assert match_pattern("nothing/**/*.png") == []
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("head", [b"RIFF\xff\xff\xff\x7fWEBPVP8L", b"\0\0\0 ftypavif"])
def test_a_sparse_file_is_not_read_whole(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sparse.webp"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(1 << 34)
    tracemalloc.start()
    with pytest.raises(ImageError, match="can take"):
        open_rgb(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_an_output_that_training_would_follow_is_refused(tmp_path: Path) -> None:
    from risam_cli.files.confine import require_own_tree

    run = tmp_path / "run"
    (run / "checkpoints/kept").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    require_own_tree(run)
    require_own_tree(tmp_path / "missing")
    for place in ("checkpoints/.last.pt.part", "metrics.jsonl2", "checkpoints/kept/best"):
        (run / place).symlink_to(tmp_path / "victim")
        with pytest.raises(OutputError, match="is a link to"):
            require_own_tree(run)
        (run / place).unlink()
    os.mkfifo(run / "checkpoints/last.pt")
    with pytest.raises(OutputError, match="neither a file nor a folder"):
        require_own_tree(run)
