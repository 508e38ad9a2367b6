"""Going on with inputs that changed: finished work is kept by content, in the order of today."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import REPO
from support.predict_runs import Killed, Run, contents, draw, draw_pictures, kill_at, run_json

from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import OutputError
from risam_cli.outputs.naming import Names
from risam_cli.runs.merge import find_parts, merge_parts
from risam_cli.runs.shard import Shard
from risam_cli.runs.writer import Saving

ALL = Saving(True, True, MAX_PIXELS, html=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, of which 4.png is broken."""
    return draw_pictures(tmp_path_factory.mktemp("in"))


def listed(path: Path, pictures: Path, names: list[str]) -> Path:
    """A manifest of images, in this order, two expressions each; ``name:words`` asks one only."""
    rows = []
    for name in names:
        image, _, words = name.partition(":")
        asked = [words] if words else ["bright", "the thing"]
        rows.append({"image": str(pictures / image), "expressions": asked})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NAMES = ["1.png", "2.png", "sub/0.png", "4.png", "5.png", "sub/6.png", "gone.png", "7.png"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([1, 2, 5], [0, 1, 2, 5], "3 kept, 1 new"),
        ([1, 2, 5], [1, 0, 2, 5], "3 kept, 1 new"),
        ([1, 2, 5], [1, 5], "2 kept, 0 new, 1 gone, and deleted with their masks"),
        ([1, 2, 5], [5, 2, 1], "3 kept, 0 new"),
        ([1, 2, 5, 7], [7, 0, 5, 2], "3 kept, 1 new, 1 gone"),
        ([1, 3, 5, 6, 7], [0, 1, 3, 6, 7], "2 kept, 1 new, 1 gone, and deleted with their masks, 2 "
         "to compute again"),
    ],
)  # fmt: skip
def test_what_was_done_is_kept_and_the_difference_computed(
    pictures: Path, tmp_path: Path, capfd: Any, before: list[int], after: list[int], told: str
) -> None:
    out, manifest = tmp_path / "out", tmp_path / "m.jsonl"
    Run([listed(manifest, pictures, [NAMES[k] for k in before])], out, saving=ALL).go()
    listed(manifest, pictures, [NAMES[k] for k in after])
    capfd.readouterr()
    run = Run([manifest], out, saving=ALL)
    run.go()
    good = set(after) - set(before) - {3, 6}
    assert run.encoded == len(good)
    assert f"the inputs changed: {told}" in capfd.readouterr().err
    Run([manifest], tmp_path / "fresh", saving=ALL).go()
    assert contents(out) == contents(tmp_path / "fresh")
    assert run_json(out)["inputs"] == run_json(tmp_path / "fresh")["inputs"]
    again = Run([manifest], out, saving=ALL)
    again.go()
    assert again.encoded == 0
    assert "inputs changed" not in capfd.readouterr().err
    assert not list((out / "masks").glob("**/sub")) or any("sub/" in NAMES[k] for k in after)


def test_a_folder_of_images_that_changed(tmp_path: Path, capfd: Any) -> None:
    images, out = draw_pictures(tmp_path / "in"), tmp_path / "out"
    Run([images], out).go()
    draw(images / "0.png", 11)  # in front
    draw(images / "3a.png", 12)  # in the middle
    draw(images / "5.png", 13)  # another picture
    (images / "2.png").unlink()
    run = Run([images], out)
    run.go()
    assert run.encoded == 3
    said = capfd.readouterr().err
    assert "6 kept, 2 new, 1 gone, and deleted with their masks, 1 to compute again" in said
    assert "5.png: the image has changed since; computed again" in said
    Run([images], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("base", [False, True])
def test_results_follow_their_lines_to_other_ids_and_names(
    pictures: Path, tmp_path: Path, capfd: Any, base: bool
) -> None:
    """Lines of one image are numbered, in ids and in the names of masks."""
    saving = replace(ALL, files=Names(base=base))
    texts = ["bright", "the thing", "dark", "x", "bright"]
    rows = [{"image": str(pictures / "1.png"), "expression": text} for text in texts]
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    own = [{**row, "id": f"own {number}"} for number, row in enumerate(rows)]
    for number, asked in enumerate((rows, rows[1:], rows[:2] + rows[3:], rows[::-1], own[1:])):
        manifest.write_text("".join(json.dumps(row) + "\n" for row in asked))
        run = Run([manifest], out, saving=saving)
        run.go()
        assert run.encoded == [1, 0, 1, 1, 0][number]
        Run([manifest], tmp_path / "fresh", saving=saving, overwrite=True).go()
        assert contents(out) == contents(tmp_path / "fresh")
    assert "4 kept, 0 new, 1 gone" in capfd.readouterr().err


@pytest.mark.parametrize("count", [2, 3])
def test_shards_of_changed_inputs_merge_to_a_fresh_run(
    pictures: Path, tmp_path: Path, count: int
) -> None:
    manifest, parts = tmp_path / "m.jsonl", [tmp_path / f"part{n}" for n in range(count)]
    for names in (NAMES[1:], NAMES, [*NAMES[3:], NAMES[0]]):
        listed(manifest, pictures, names)
        for index, part in enumerate(parts):
            Run([manifest], part, plan={"shard": Shard(index, count)}).go()
        merge_parts(find_parts(parts), tmp_path / "merged", overwrite=True)
        Run([manifest], tmp_path / "fresh", overwrite=True).go()
        assert contents(tmp_path / "merged") == contents(tmp_path / "fresh")


def test_a_merged_folder_goes_on_with_changed_inputs(pictures: Path, tmp_path: Path) -> None:
    manifest, parts = tmp_path / "m.jsonl", [tmp_path / f"part{n}" for n in range(2)]
    listed(manifest, pictures, NAMES[1:])
    for index, part in enumerate(parts):
        Run([manifest], part, plan={"shard": Shard(index, 2)}).go()
    merge_parts(find_parts(parts), tmp_path / "merged")
    listed(manifest, pictures, NAMES)
    run = Run([manifest], tmp_path / "merged")
    run.go()
    assert run.encoded == 1
    Run([manifest], tmp_path / "fresh").go()
    assert contents(tmp_path / "merged") == contents(tmp_path / "fresh")


def test_a_stream_is_read_ahead_as_far_as_it_was_done(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest = tmp_path / "out", tmp_path / "m.jsonl"

    def go(names: list[str], to: Path) -> Run:
        lines = listed(manifest, pictures, names).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        run = Run(["-"], to)
        run.go()
        return run

    go(NAMES[1:4], out)
    assert go(NAMES[1:5], out).encoded == 1
    assert go([NAMES[7], *NAMES[1:6]], out).encoded == 2
    go([NAMES[7], *NAMES[1:6]], tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_other_inputs_delete_nothing(pictures: Path, tmp_path: Path) -> None:
    """A run over one image, say, into the folder of a run over all."""
    manifest, out = listed(tmp_path / "m.jsonl", pictures, NAMES), tmp_path / "out"
    Run([manifest], out).go()
    wanted = contents(out)
    listed(manifest, pictures, [NAMES[0], "3.png"])
    with pytest.raises(OutputError, match="of 7 that are not among them, and of 1 that are"):
        Run([manifest], out).go()
    assert contents(out) == wanted
    assert Run([listed(manifest, pictures, NAMES)], out).encoded == 0


orders = st.lists(st.sampled_from(range(len(NAMES))), min_size=1, max_size=8, unique=True)


@settings(max_examples=25, deadline=None)
@given(first=orders, after=st.lists(st.tuples(orders, st.integers(0, 6)), min_size=1, max_size=3))
def test_kills_and_changes_in_any_order_end_as_a_fresh_run(
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
    first: list[int],
    after: list[tuple[list[int], int]],
) -> None:
    base = tmp_path_factory.mktemp("changed")
    manifest, out = base / "m.jsonl", base / "out"

    def go(order: list[int], kill: int) -> Run:
        listed(manifest, pictures, [NAMES[k] for k in order])
        run = Run([manifest], out)
        kill_at(run.model, kill)
        with suppress(Killed):
            try:
                run.go()
            except OutputError as error:
                if "that are not among them" not in str(error):
                    raise
                replace(run, overwrite=True).go()
        return run

    go(first, 2)
    for order, kill in after:
        go(order, kill)
    last = after[-1][0]
    go(last, 99)
    assert go(last, 99).encoded == 0
    Run([manifest], base / "fresh").go()
    assert contents(out) == contents(base / "fresh")


@pytest.mark.slow
def test_a_kill_at_any_change_of_the_folder_costs_nothing() -> None:
    sweep = [sys.executable, str(REPO / "benchmarks" / "kill_points.py"), "--every", "7"]
    sweep += ["--only", "predict --resume, other inputs"]
    path = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    subprocess.run(sweep, check=True, env=path)
