"""Inputs of every kind become samples in order, or failures with their place."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from risam_cli.data.inputs.counting import NameCounts
from risam_cli.data.inputs.expressions import read_expressions
from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.data.inputs.manifest import MAX_LINE
from risam_cli.errors import DataError, UsageError
from risam_cli.runs.ranks import ranks_of_environment
from risam_cli.runs.shard import Shard, cost_of, parse_shard


def entries(*arguments: str | Path, e: Sequence[str] = (), **options: object) -> list[Entry]:
    return list(Inputs([str(a) for a in arguments], e, **options))  # type: ignore[arg-type]


def asked(found: Sequence[Entry]) -> list[tuple[str, str]]:
    return [(x.id, x.text) for one in found if one.sample for x in one.sample.expressions]


def wrong(found: Sequence[Entry]) -> list[str]:
    return [failure.message for entry in found for failure in entry.failures]


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


# --- files, folders, patterns ---------------------------------------------------------------------


def test_a_folder_is_walked_in_order_with_paths_as_given(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt", ".hidden.jpg", "z.tif"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = entries(f"{tmp_path}/in/", e=["x"])
    images = [entry.image for entry in found]
    assert images == [f"{tmp_path}/in/{name}" for name in ("a.PNG", "b.jpg", "sub/c.webp", "z.tif")]
    assert asked(found)[0] == (f"{tmp_path}/in/a.PNG#0", "x")
    inputs = Inputs([str(tmp_path / "in")], ["x"])
    assert len(list(inputs)) == len(list(inputs)) == 4
    assert inputs.skipped == {".txt files": 1, "hidden files and folders": 1}


def test_several_expressions_are_numbered_from_0(tmp_path: Path) -> None:
    found = entries("a.jpg", "b.jpg", "a.jpg", e=["x", "y"])
    assert [name for name, _ in asked(found)] == [
        "a.jpg#0",
        "a.jpg#1",
        "b.jpg#0",
        "b.jpg#1",
        "a.jpg#2",
        "a.jpg#3",
    ]
    numbers = [x.number for one in found for x in one.sample.expressions]
    assert numbers == [0, 1, 0, 1, 2, 3]
    assert [one.run for one in found] == [0, 1, 2]


def test_links_are_followed_only_inside_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.jpg").touch()
    (inside / "real" / "a.jpg").touch()
    (inside / "alias.jpg").symlink_to(inside / "real" / "a.jpg")
    (inside / "leak.jpg").symlink_to(outside / "secret.jpg")
    (inside / "linked").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "gone.jpg").symlink_to(inside / "nothing.jpg")
    inputs = Inputs([str(inside)], ["x"])
    names = [Path(entry.image).name for entry in inputs]
    assert names == ["alias.jpg", "gone.jpg", "a.jpg"]
    assert inputs.skipped == {"links that lead out of the folder": 1, "linked folders": 2}
    # What the user names is followed, wherever it leads.
    assert len(entries(inside / "linked", e=["x"])) == 1


def test_results_are_not_walked_into(tmp_path: Path) -> None:
    for name in ("a.jpg", "old/masks/m.png", "now/masks/m.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "old" / ".risam").mkdir()
    inputs = Inputs([str(tmp_path)], ["x"], exclude=tmp_path / "now")
    assert [Path(entry.image).name for entry in inputs] == ["a.jpg"]
    assert inputs.skipped == {"output folders": 2}


def test_an_unreadable_folder_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "z.jpg").touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("shut"):  # for root, too, who may read everything
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = entries(tmp_path, e=["x"])
    assert wrong(found) == [f"{tmp_path}/shut: Permission denied"]
    assert len(asked(found)) == 1


def test_patterns_match_files_folders_and_depth(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "notes.txt", "sub/c.jpg", "d[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [Path(entry.image).name for entry in entries(tmp_path / "*", e=["x"])]
    assert names == ["a.jpg", "b.png", "d[1].jpg", "c.jpg"]
    assert len(entries(tmp_path / "**" / "*.jpg", e=["x"])) == 3
    assert len(entries(tmp_path / "d[1].jpg", e=["x"])) == 1  # a name before a pattern
    write_lines(tmp_path / "m1.jsonl", {"image": "a.jpg", "expression": "y"})
    assert asked(entries(tmp_path / "m*.jsonl")) == [("a.jpg#0", "y")]


# --- manifests ------------------------------------------------------------------------------------


def test_ids_are_those_of_the_contract(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl",
        {"image": "a.jpg", "expression": "x"},
        {"image": "b.jpg", "expressions": ["x", "y"]},
        {"image": "a.jpg", "expression": "z", "id": 7},
        {"image": "a.jpg", "expressions": ["p", "q"], "id": "seven"},
        "",
        {"image": "a.jpg", "expressions": ["only"], "id": "one"},
        {"image": "a.jpg", "expression": "again"},
    )
    found = entries(path)
    assert asked(found) == [
        ("a.jpg#0", "x"),
        ("b.jpg#0", "x"),
        ("b.jpg#1", "y"),
        ("7", "z"),
        ("seven#0", "p"),
        ("seven#1", "q"),
        ("one", "only"),
        ("a.jpg#5", "again"),
    ]
    assert found[0].sample.path == tmp_path / "a.jpg"
    assert found[4].where == f"{path}, line 6"


def test_the_expressions_given_are_for_those_that_bring_none(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl",
        {"image": "a.jpg"},
        {"image": "b.jpg", "expression": "own"},
        {"image": "c.jpg", "expressions": [], "id": "c"},
    )
    assert asked(entries(path, e=["x", "y"])) == [
        ("a.jpg#0", "x"),
        ("a.jpg#1", "y"),
        ("b.jpg#0", "own"),
        ("c#0", "x"),
        ("c#1", "y"),
    ]
    assert "line 1: a.jpg: no expression" in wrong(entries(path))[0]


BAD_LINES = [
    ("{", "not JSON"),
    ("just words", "not JSON"),
    ("[1, 2]", "not an object"),
    ('"text"', "not an object"),
    ('{"expression": "x"}', "lacks 'image'"),
    ('{"image": "", "expression": "x"}', "has the image ''"),
    ('{"image": 5, "expression": "x"}', "has the image 5"),
    ('{"image": "a.jpg", "expression": 5}', "'expression' is 5"),
    ('{"image": "a.jpg", "expressions": "x"}', "'expressions' is 'x'"),
    ('{"image": "a.jpg", "expressions": ["x", null]}', "'expressions'"),
    ('{"image": "a.jpg", "expression": "x", "expressions": ["y"]}', "give one of them"),
    ('{"image": "a.jpg", "expression": ""}', "has no words"),
    ('{"image": "a.jpg", "expression": " \\t"}', "has no words"),
    ('{"image": "a.jpg", "expression": "???"}', "has no words"),
    ('{"image": "a.jpg", "expression": "x", "id": [1]}', "'id' is [1]"),
    ('{"image": "a.jpg", "expression": "x", "id": ""}', "'id' is ''"),
    ('{"image": "a.jpg", "expression": "x", "id": true}', "'id' is True"),
    ('{"image": "a.jpg", "expression": "x", "id": "taken"}', "'taken' was given before"),
    ('{"image": "a.jpg", "expression": "half \\ud83d"}', "not Unicode text"),
    ('{"image": "a\\u0000.jpg", "expression": "x"}', "not a valid file path"),
    ('{"image": "a.jpg", "expression": "' + "x" * MAX_LINE + '"}', "longer than"),
    ("[" * 200_000, "nested too deep"),
    ('{"image": "a.jpg", "id": ' + "1" * 5000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("line", "text"), BAD_LINES, ids=[text for _, text in BAD_LINES])
def test_a_bad_line_is_one_failure_and_the_rest_goes_on(
    tmp_path: Path, line: str, text: str
) -> None:
    good = [{"image": f"{n}.jpg", "expression": "x", "id": n} for n in ("taken", "last")]
    path = write_lines(tmp_path / "m.jsonl", good[0], line, good[1])
    found = entries(path)
    assert [name for name, _ in asked(found)] == ["taken", "last"]
    (message,) = wrong(found)
    assert text in message
    assert f"{path}, line 2" in message
    assert len(message) < 600
    assert [entry.index for entry in found] == [0, 1, 2]
    assert found[1].failures[0].stage == "read"
    assert found[1].failures[0].id


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'{"image": "\xff.jpg", "expression": "x"}\n{"image": "b.jpg","expression":"y"}'
    )
    found = entries(path)
    assert "line 1: not UTF-8" in wrong(found)[0]
    assert asked(found) == [("b.jpg#0", "y")]


def test_one_bad_expression_among_good_ones(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"image": "a.jpg", "expressions": ["x", " ", "y"]})
    (entry,) = entries(path)
    assert asked([entry]) == [("a.jpg#0", "x"), ("a.jpg#2", "y")]
    assert [failure.id for failure in entry.failures] == ["a.jpg#1"]
    assert entry.size == 3


def test_image_root_moves_where_paths_start_and_how_far_they_may_go(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = write_lines(
        tmp_path / "lists" / "m.jsonl",
        {"image": "a.jpg", "expression": "x"},
        {"image": "lists/../b.jpg", "expression": "x"},
        {"image": str(tmp_path / "c.jpg"), "expression": "x"},
        {"image": "../d.jpg", "expression": "x"},
    )
    found = entries(path, image_root=tmp_path)
    assert [entry.sample is not None for entry in found] == [True] * 4
    assert os.path.normpath(found[0].sample.path) == str(tmp_path / "a.jpg")
    assert os.path.normpath(found[3].sample.path) == str(tmp_path.parent / "d.jpg")
    confined = list(Inputs([str(path)], image_root=tmp_path, confine=True))
    assert [entry.sample is not None for entry in confined] == [True, True, True, False]
    assert "'../d.jpg' is outside of" in wrong(confined)[0]
    everything = entries(path, image_root=Path("/"))
    assert everything[2].sample.path == tmp_path / "c.jpg"


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, mark: str) -> None:
    rows = [
        ["\ufeffImage", "id", " Expression "],
        ["a.jpg", "1", "x"],
        ["a.jpg", "", '"one, ""two""\tthree"'],
        ["", "3", "x"],
        ["b.jpg", "4"],
        [],
        ["c.jpg", "", '"over\ntwo lines"'],
        ["d.jpg", "5", ""],
    ]
    path = tmp_path / f"m.{suffix}"
    path.write_text("\r\n".join(mark.join(row) for row in rows))
    found = entries(path)
    assert asked(found) == [
        ("1", "x"),
        ("a.jpg#1", 'one, "two"\tthree'),
        ("c.jpg#0", "over\ntwo lines"),
    ]
    messages = wrong(found)
    assert "line 4: lacks 'image'" in messages[0]
    assert "line 5: 2 values for 3 columns" in messages[1]
    assert "line 9: d.jpg: no expression" in messages[2]
    assert asked(entries(path, e=["given"]))[-1] == ("5", "given")


def test_a_table_with_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        b"image,expression\na.jpg,\xff\n\xff.jpg,x\nb.jpg,"
        + b"y" * 200_000
        + b"\nc.jpg,x\nd.jpg,\x00\n"
    )
    found = entries(path)
    messages = wrong(found)
    assert "line 2: the expression is not UTF-8" in messages[0]
    assert "line 4: not a row" in messages[1]
    assert [text for _, text in asked(found)] == ["x", "x"]
    assert "has no words" in messages[2]
    assert os.fsencode(found[1].sample.path).endswith(b"/\xff.jpg")
    for content, text in ((b"", "no column 'image'"), (b"picture,text\na,b\n", "picture, text")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            entries(path)


def test_coco_files(tmp_path: Path) -> None:
    data = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 4, "width": 6},
            {"id": 2, "file_name": "b.jpg", "height": 4, "width": 6},
            {"id": 3, "file_name": "../c.jpg", "height": 4, "width": 6},
        ],
        "annotations": [],
        "categories": [],
        "expressions": [
            {"id": 11, "image_id": 1, "ann_ids": [], "text": "x"},
            {"id": 12, "image_id": 1, "ann_ids": [], "text": "y"},
            {"id": 13, "image_id": 3, "ann_ids": [], "text": "z"},
        ],
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    assert asked(list(Inputs([str(path)]))) == [("11", "x"), ("12", "y"), ("13", "z")]
    inputs = Inputs([str(path)], confine=True)
    found = list(inputs)
    assert asked(found) == [("11", "x"), ("12", "y")]
    assert "is outside" in wrong(found)[0]
    assert found[1].failures[0].id == "13"
    assert inputs.skipped == {"images without an expression": 1}
    assert found[0].sample.size == (4, 6)
    assert ("b.jpg#0", "mine") in asked(entries(path, e=["mine"]))


def test_stdin_is_answered_line_by_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(read_end))  # noqa: SIM115
    monkeypatch.chdir(tmp_path)
    stream = iter(Inputs(["-"]))
    os.write(write_end, b'{"image": "../a.jpg", "expression": "x"}\n')
    entry = next(stream)  # though nothing more has come
    assert asked([entry]) == [("../a.jpg#0", "x")]  # a pipe is the user's own
    os.write(write_end, b"oops\n")
    assert "<stdin>, line 2" in next(stream).failures[0].message
    os.close(write_end)
    assert next(stream, None) is None


def test_stdin_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"image": "a.jpg", "expression": "x"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    assert asked(entries("-")) == [("a.jpg#0", "x")]


# --- what can be known before the start -----------------------------------------------------------


def test_images_without_an_expression_are_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    table = tmp_path / "m.csv"
    table.write_text("image\na.jpg\n")
    for argument in (tmp_path, tmp_path / "a.jpg", tmp_path / "*.jpg", "none.jpg", table):
        with pytest.raises(UsageError, match="expression=TEXT"):
            Inputs([str(argument)]).check()
        Inputs([str(argument)], ["x"]).check()


def test_inputs_that_cannot_be_are_found_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"images": 5')
    (tmp_path / "bad.csv").write_text("a,b\n")
    for argument, text in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path / "nothing.jsonl", "no such file or folder"),
        (tmp_path / "*.tiff", "matches no file"),
        (tmp_path / "empty", "no image in this folder"),
        (tmp_path / "bad.json", "bad.json"),
        (tmp_path / "bad.csv", "no column 'image'"),
    ):
        with pytest.raises(DataError, match=text):
            Inputs([str(argument)], ["x"]).check()
    for arguments, expressions in (
        (["-", "-"], []),
        (["a.jpg"], [" "]),
        (["a\0.jpg"], ["x"]),
        (["a.jpg"], ["\udcff"]),
    ):
        with pytest.raises(UsageError):
            Inputs(arguments, expressions).check()
    Inputs([str(tmp_path / "nothing.jpg")], ["x"]).check()  # an item that fails, not the run


def test_expressions_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "e.txt"
    path.write_bytes("\ufeffthe dog\r\n\r\n  the cat \nüber".encode())
    assert read_expressions(path) == ["the dog", "the cat", "über"]
    path.write_text("\n \n")
    with pytest.raises(UsageError, match="holds no expression"):
        read_expressions(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_expressions(path)
    with pytest.raises(DataError, match="gone"):
        read_expressions(tmp_path / "gone")


# --- counting and parts ---------------------------------------------------------------------------


@given(st.lists(st.text(max_size=3), max_size=400))
def test_names_are_counted(names: list[str]) -> None:
    counts, seen = NameCounts(), dict.fromkeys(names, 0)
    for name in names:
        assert counts.add(name) == seen[name]
        seen[name] += 1
    assert len(counts) == len(seen)


def test_many_names_are_counted_in_little_memory() -> None:
    counts = NameCounts()
    assert all(counts.add(f"photos/{n}.jpg#0") == 0 for n in range(20_000))
    assert all(counts.add(f"photos/{n}.jpg#0") == 1 for n in range(0, 20_000, 7))
    assert len(counts) == 20_000


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 5))
def test_shards_share_nothing_and_miss_nothing(images: list[str], count: int) -> None:
    found = entries(*(f"{name}.jpg" for name in images), e=["x"])
    parts = [[one.index for one in Shard(i, count).own(found)] for i in range(count)]
    assert sorted(index for part in parts for index in part) == list(range(len(found)))
    for one, other in itertools.pairwise(found):
        if one.image == other.image:  # stays together, to be encoded once
            assert one.run == other.run


def test_shards_are_counted_from_0_or_from_1() -> None:
    assert [parse_shard(f"{i}/3").index for i in (0, 1, 2, 3)] == [0, 1, 2, 0]
    for text in ("4/3", "-1/3", "1", "a/b", "0/0", "1/2/3", ""):
        with pytest.raises(UsageError, match="I/N"):
            parse_shard(text)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(2, 7))
def test_shards_cost_alike(lines: list[int], count: int) -> None:
    """However many expressions images have, no part has more than its fair share and an image."""
    names = [f"{k}.jpg" for k, several in enumerate(lines) for _ in range(several)]
    found = entries(*names, e=["x"])
    costs = [cost_of(several, None) for several in lines]
    runs = [{one.run for one in Shard(i, count).own(found)} for i in range(count)]
    assert sum(map(len, runs)) == len(lines)
    loads = [sum(costs[run] for run in own) for own in runs]
    assert max(loads) <= sum(costs) / count + max(costs)


def test_torchrun_gives_the_shard() -> None:
    found = ranks_of_environment({"RANK": "2", "WORLD_SIZE": "4", "MASTER_PORT": "1"})
    assert found is not None
    assert (found.shard, found.leads, found.restarted) == (Shard(2, 4), False, False)
    assert found.shard.folder(Path("o")) == Path("o/shard-00002-of-00004")
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "x", "WORLD_SIZE": "4"}):
        assert ranks_of_environment(environment) is None
