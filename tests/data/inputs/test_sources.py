"""Lists and folders as users have them: paths anywhere, pipes, links, patterns, own results."""

from __future__ import annotations

import io
import json
import os
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from risam_cli.cli import main
from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.errors import DataError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def places(entries: list[Entry]) -> list[str]:
    return [os.path.realpath(entry.sample.path) for entry in entries if entry.sample is not None]


def wrong(entries: list[Entry]) -> list[str]:
    return [failure.message for entry in entries for failure in entry.failures]


# --- paths of lists -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_absolute_paths_and_dots_are_read_where_they_point(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    touch(tmp_path / "a.png", tmp_path / "b" / "b.png", folder / "c.png")
    names = [str(tmp_path / "a.png"), "../b/b.png", "c.png"]
    path = folder / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"image": n, "expression": "x"}) + "\n" for n in names))
    elif kind == "csv":
        path.write_text("\ufeffExpression;Image\n" + "".join(f"x;{name}\n" for name in names))
    else:
        images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
        said = [{"id": k, "image_id": k, "text": "x"} for k in range(3)]
        path.write_text(json.dumps({"images": images, "expressions": said}))
    found = list(Inputs([str(path)]))
    assert places(found) == [
        os.path.realpath(one)
        for one in (tmp_path / "a.png", tmp_path / "b/b.png", folder / "c.png")
    ]
    confined = list(Inputs([str(path)], confine=True))
    assert places(confined) == [os.path.realpath(folder / "c.png")]
    assert all("is outside of" in message for message in wrong(confined))
    assert len(wrong(confined)) == 2


def test_confined_lists_follow_no_link_out(tmp_path: Path) -> None:
    touch(tmp_path / "secret.png", tmp_path / "in" / "a.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    path = tmp_path / "in" / "l.jsonl"
    path.write_text(
        '{"image": "link.png", "expression": "x"}\n{"image": "a.png", "expression": "x"}\n'
    )
    assert len(places(list(Inputs([str(path)])))) == 2
    confined = list(Inputs([str(path)], confine=True))
    assert places(confined) == [os.path.realpath(tmp_path / "in" / "a.png")]


def test_backslashes_and_other_spellings_of_letters_find_the_file(tmp_path: Path) -> None:
    composed = "caf\u00e9.png"
    touch(tmp_path / "d" / unicodedata.normalize("NFD", composed), tmp_path / "d" / "b.png")
    path = tmp_path / "l.jsonl"
    names = ["d\\b.png", f"d/{composed}"]
    path.write_text("".join(json.dumps({"image": n, "expression": "x"}) + "\n" for n in names))
    assert all(os.path.exists(place) for place in places(list(Inputs([str(path)]))))


# --- stdin and pipes ------------------------------------------------------------------------------


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    class Stdin:
        buffer = io.BytesIO(data)

    monkeypatch.setattr("sys.stdin", Stdin())


def images(inputs: Inputs) -> list[str]:
    return [entry.image for entry in inputs]


def test_paths_come_one_a_line_where_expressions_are_given(monkeypatch: Any) -> None:
    stdin(monkeypatch, b'a b.png\r\n\n./c.png\n{"image": "d.png", "expression": "its own"}\n')
    found = list(Inputs(["-"], ["x"]))
    assert [entry.image for entry in found] == ["a b.png", "./c.png", "d.png"]
    assert [e.text for entry in found for e in entry.sample.expressions] == ["x", "x", "its own"]


@pytest.mark.parametrize("null", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_first_path(null: bool, monkeypatch: Any) -> None:
    ends = b"\0" if null else b"\r\n"
    stdin(monkeypatch, b"\xef\xbb\xbfa.png" + ends + b"b.png" + ends)
    assert images(Inputs(["-"], ["x"], null_separated=null)) == ["a.png", "b.png"]


def test_paths_may_end_in_nul(monkeypatch: Any) -> None:
    stdin(monkeypatch, b"a\nb.png\0{c}.png\0\xff.png")
    found = images(Inputs(["-"], ["x"], null_separated=True))
    assert found == ["a\nb.png", "{c}.png", os.fsdecode(b"\xff.png")]


def test_a_path_without_expressions_says_what_would_take_it(monkeypatch: Any) -> None:
    stdin(monkeypatch, b"a.png\n")
    (message,) = wrong(list(Inputs(["-"])))
    assert "plain paths are accepted if expressions are given" in message


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_table_comes_on_stdin_too(monkeypatch: Any, mark: str, start: str) -> None:
    stdin(monkeypatch, f"{start}Image{mark} Expression\na.png{mark}x\nb.png{mark}\n".encode())
    found = list(Inputs(["-"], ["of all"]))
    assert [entry.image for entry in found] == ["a.png", "b.png"]
    assert [e.text for entry in found for e in entry.sample.expressions] == ["x", "of all"]


def test_an_image_on_stdin_is_no_list(monkeypatch: Any) -> None:
    for data in (
        b"\x89PNG\r\n\x1a\n\0\0",
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        b"II*\0\x08\0",
        b"RIFF\0\0",
        b"RIFF\x24\x10\x01\0WEBP",
        b"BM\x36\x30\x01\0\0\0\0\0",
        b"GIF89a\x40\0",
    ):
        stdin(monkeypatch, data)
        with pytest.raises(DataError, match="holds an image, not a list of images"):
            list(Inputs(["-"], ["x"]))


@pytest.mark.parametrize("null", [False, True])
def test_a_path_may_begin_as_an_image_does(monkeypatch: Any, null: bool) -> None:
    names = ["BMW.jpg", "RIFF/a.png", "GIF8.gif"]
    for first in names:
        ends = "\0" if null else "\n"
        stdin(monkeypatch, f"{first}{ends}b.png{ends}".encode())
        assert [one.image for one in Inputs(["-"], ["x"], null_separated=null)] == [first, "b.png"]


def test_paths_that_end_in_nul_without_the_option_say_so(monkeypatch: Any) -> None:
    stdin(monkeypatch, b"a.png\0b.png\0")
    (message,) = wrong(list(Inputs(["-"], ["x"])))
    assert "NUL-terminated paths; give null_separated" in message


def test_an_array_on_stdin_says_how_to_part_it(monkeypatch: Any) -> None:
    stdin(monkeypatch, b'[{"image": "a.png", "expression": "x"}]\n')
    (message,) = wrong(list(Inputs(["-"])))
    assert "one object a line; jq -c '.[]' parts an array" in message


@pytest.mark.parametrize("text", ['{"image": "a.png", "expression": "x"}\n', "a.png\n"])
def test_a_named_pipe_is_read_as_a_stream(text: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    inputs = Inputs([str(pipe)], ["x"])
    inputs.check()
    assert not inputs.repeatable
    assert images(inputs) == ["a.png"]
    writer.join()


def test_expressions_come_from_a_pipe_too(tmp_path: Path) -> None:
    from risam_cli.data.inputs.expressions import read_expressions

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("one\ntwo\n"))
    writer.start()
    assert read_expressions(pipe) == ["one", "two"]
    writer.join()


def test_nul_without_stdin_is_wrong_usage(capsys: Any) -> None:
    assert main(["predict", "a.png", "-0", "-e", "x"]) == 2
    assert "-0 is for paths on stdin" in capsys.readouterr().err


# --- patterns and folders -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["**", "**/*", "**/*.png", "*/**"])
def test_nested_images_are_listed_once(pattern: str, tmp_path: Path) -> None:
    touch(tmp_path / "in" / "d" / "e" / "a.png", tmp_path / "in" / "d" / "b.png")
    found = images(Inputs([str(tmp_path / "in" / pattern)], ["x"]))
    assert len(found) == 2
    assert {os.path.basename(name) for name in found} == {"a.png", "b.png"}


def test_patterns_follow_no_linked_folder(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "a.png", tmp_path / "in" / "b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    inputs = Inputs([str(tmp_path / "in" / "**")], ["x"])
    assert [os.path.basename(name) for name in images(inputs)] == ["b.png"]
    assert inputs.skipped["linked folders"] >= 1


def test_brackets_may_be_part_of_a_folders_name(tmp_path: Path) -> None:
    touch(tmp_path / "[2024] trip" / "a.png")
    assert len(images(Inputs([f"{tmp_path}/[2024] trip/*.png"], ["x"]))) == 1
    inputs = Inputs([f"{tmp_path}/[2023] trip/*.png"], ["x"])
    with pytest.raises(DataError, match=r"matches no file .* \[\[\] is a literal \["):
        inputs.check()


def test_a_folder_without_an_image_says_what_it_holds(tmp_path: Path) -> None:
    touch(
        tmp_path / "elsewhere" / "a.png", tmp_path / "in" / "notes.txt", tmp_path / "in" / "b.mov"
    )
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    with pytest.raises(DataError, match="no image in this folder; skipped: ") as error:
        Inputs([str(tmp_path / "in")], ["x"]).check()
    for words in ("1 links that lead out of the folder", "1 .txt files", "1 .mov files"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["a.heic", "a.HIF", "a.jxl"])
def test_phones_images_are_images(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "in" / name)
    Inputs([str(tmp_path / "in")], ["x"]).check()
    assert len(images(Inputs([str(tmp_path / "in")], ["x"]))) == 1


# --- own results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["export", "eval", "train", "predict"])
def test_folders_that_risam_writes_are_no_input(how: str, tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.png", tmp_path / "in" / "out" / "cutouts" / "a.png")
    out = tmp_path / "in" / "out"
    if how == "export":
        (out / "export.json").write_text('{\n "kind": "cutout",\n "owns": ["cutouts"]}')
    elif how == "eval":
        (out / "report.json").write_text('{\n "schema_version": 1}')
    elif how == "train":
        (out / "config.resolved.yaml").write_text("name: x\nseed: 0\nprecision: bf16\n")
    else:
        (out / ".risam").mkdir()
    inputs = Inputs([str(tmp_path / "in")], ["x"])
    assert [os.path.basename(name) for name in images(inputs)] == ["a.png"]
    assert inputs.skipped["output folders"] == 1
    # Named by itself it is what the user wants.
    assert len(images(Inputs([str(out)], ["x"]))) == 1


def test_another_tools_report_is_no_mark(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "d" / "a.png")
    (tmp_path / "in" / "d" / "report.json").write_text('{"weather": "fair"}')
    assert len(images(Inputs([str(tmp_path / "in")], ["x"]))) == 1


def test_a_real_export_inside_of_the_input_is_recognized(tmp_path: Path) -> None:
    from support.export_cases import export, record, shapes, write_image, write_jsonl

    write_image(tmp_path / "in" / "a.png")
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.png", "x", shapes()["block"])])
    out = tmp_path / "in" / "cut"
    assert export(source, "--to", "cutout", "-o", out, "--image-root", tmp_path / "in") == 0
    assert len(images(Inputs([str(tmp_path / "in")], ["x"]))) == 1


def test_one_image_named_twice_goes_on_counting(tmp_path: Path) -> None:
    found = list(Inputs(["d/a.png", "./d/a.png", "d//a.png", "d/b.png"], ["x"]))
    ids = [e.id for entry in found for e in entry.sample.expressions]
    assert ids == ["d/a.png#0", "./d/a.png#1", "d//a.png#2", "d/b.png#0"]
    assert not wrong(found)
