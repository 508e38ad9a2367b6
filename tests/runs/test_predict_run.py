"""Runs of predict: resume, overwrite, retry, shards, and the ledger behind them."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.predict_fakes import FakeModel
from support.predict_runs import (
    CPU,
    FILES,
    Killed,
    Run,
    at_image,
    contents,
    draw,
    draw_pictures,
    kill_at,
    run_json,
    signals,
)
from support.records import read_records

from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import Interrupted, OutputError, RisamError
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.inference.pipeline import PredictSettings
from risam_cli.masks import rle as masks
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import LEDGER, read_lines
from risam_cli.runs.merge import find_parts, merge_parts
from risam_cli.runs.shard import Shard
from risam_cli.runs.writer import Saving


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "in")


# --- one run --------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_contract_says(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stream = io.BytesIO()
    run = Run([pictures], out, stream=stream)
    assert run.go() == 3
    records = read_records(out)
    assert len(records) == 14
    assert run.encoded == 7
    assert [record.id for record in records][:3] == [
        f"{pictures}/1.png#0",
        f"{pictures}/1.png#1",
        f"{pictures}/2.png#0",
    ]
    for record in records:
        with Image.open(out / (record.mask or "")) as mask:
            assert (np.asarray(mask) == 255 * masks.decode(record.segmentation)).all()
            assert mask.size == (record.width, record.height)
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{pictures}/4.png#{k}" for k in (0, 1)]
    assert stream.getvalue() == (out / "predictions.jsonl").read_bytes()
    report = run_json(out)
    assert report["status"] == "complete"
    assert report["counts"]["records"] == 14
    assert report["counts"]["failures"] == 2
    assert report["counts"]["this_time"]["images"] == 7
    assert report["inputs"]["entries"] == 8
    assert report["model"] == {"name": "fake", "hash": "0" * 64}
    assert report["shard"] == {"index": 0, "count": 1}
    parts = {"load_images", "encode", "decode_masks", "finish_masks", "write", "total"}
    assert parts <= set(report["seconds"])
    assert {p.name for p in out.iterdir()} == {*FILES, LEDGER, "run.json", "masks", ".risam"}
    assert [p.name for p in (out / ".risam").iterdir()] == ["made_by"]
    assert (out / ".risam" / "made_by").read_text() == "predict\n"


def test_the_same_run_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    Run([pictures], folders[0]).go()
    Run([pictures], folders[1], settings=PredictSettings(CPU, batch_size=5, workers=1)).go()
    Run([pictures], folders[2], settings=PredictSettings(CPU, batch_size=1, lookahead=2)).go()
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])


def test_what_is_saved_beside_the_records(pictures: Path, tmp_path: Path) -> None:
    image = pictures / "1.png"
    nothing, overlay = tmp_path / "n", tmp_path / "o"
    Run([image], nothing, saving=Saving(False, False, MAX_PIXELS)).go()
    assert {p.name for p in nothing.iterdir()} == {*FILES, LEDGER, "run.json", ".risam"}
    assert [record.mask for record in read_records(nothing)] == [None, None]
    Run([image], overlay, saving=Saving(False, True, MAX_PIXELS)).go()
    assert [record.mask for record in read_records(overlay)] == [None, None]
    (drawn,) = (overlay / "overlays").rglob("*.png")
    with Image.open(drawn) as picture:
        assert picture.mode == "RGB"
        assert picture.width >= 24


def test_manifest_lines_that_are_wrong_keep_their_place(pictures: Path, tmp_path: Path) -> None:
    manifest = pictures / "m.jsonl"
    lines = ['{"image": "1.png", "expression": "x"}', "oops", '{"image": "gone.png"}']
    lines += ['{"image": "1.png", "expression": "yy", "id": 5}', '{"image": "2.png"}', "[]"]
    manifest.write_text("\n".join(lines))
    run = Run([manifest], tmp_path / "out", e=["z"])
    assert run.go() == 3
    assert run.encoded == 2
    assert [record.id for record in read_records(tmp_path / "out")] == ["1.png#0", "5", "2.png#0"]
    rows = [json.loads(x) for x in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["m.jsonl:2", "gone.png#0", "m.jsonl:6"]
    assert rows[1]["message"].startswith(f"{manifest}, line 3: ")
    assert "no such file" in rows[1]["message"]
    assert [line.entry for line, _ in read_lines(tmp_path / "out" / LEDGER)] == list(range(6))


def test_only_failures_and_nothing_at_all(tmp_path: Path) -> None:
    assert Run(["gone.png"], tmp_path / "out").go() == 3
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == b""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert Run([tmp_path / "empty.jsonl"], tmp_path / "none").go() == 0


def test_a_limit_takes_the_first_images(pictures: Path, tmp_path: Path) -> None:
    Run([pictures], tmp_path / "three", plan={"limit": 3}).go()
    assert len(read_records(tmp_path / "three")) == 4
    Run([pictures], tmp_path / "three", plan={"limit": 6}).go()  # goes on
    Run([pictures], tmp_path / "six", plan={"limit": 6}).go()
    assert contents(tmp_path / "three") == contents(tmp_path / "six")


# --- going on -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and the folder of a whole run over them."""
    base = tmp_path_factory.mktemp("finished")
    pictures = draw_pictures(base / "in")
    Run([pictures], base / "out").go()
    return pictures, base / "out"


def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(finished[1], out)
    return finished[0], out


@settings(max_examples=12)
@given(
    keep=st.tuples(*[st.floats(0, 1)] * 3),
    lost=st.lists(st.integers(0, 13), max_size=4),
    spoilt=st.lists(st.integers(0, 13), max_size=2),
    junk=st.binary(max_size=30),
)
def test_whatever_a_kill_leaves_the_resumed_run_has_the_same_bytes(
    finished: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    keep: tuple[float, float, float],
    lost: list[int],
    spoilt: list[int],
    junk: bytes,
) -> None:
    wanted = contents(finished[1])
    pictures, out = copied(finished, tmp_path_factory.getbasetemp() / "killed")
    for name, share in zip((*FILES, LEDGER), keep, strict=True):
        data = (out / name).read_bytes()
        end = int(len(data) * share)
        if name == LEDGER:  # a run begins with its header on the disk
            end = max(end, data.index(b"\n") + 1)
        (out / name).write_bytes(data[:end] + (junk if share < 1 else b""))
    paths = sorted((out / "masks").rglob("*.png"))
    for number in lost:
        paths[number].unlink(missing_ok=True)
    for number in spoilt:
        if paths[number].exists():
            paths[number].write_bytes(paths[number].read_bytes()[:-1] + b"?")
    assert Run([pictures], out).go() == 3
    assert contents(out) == wanted
    assert run_json(out)["counts"]["records"] == 14
    again = Run([pictures], out)
    assert again.go() == 3
    assert again.encoded == 0  # everything counted as done


def test_a_finished_run_is_not_done_again(finished: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, out = copied(finished, tmp_path)
    stream = io.BytesIO()
    run = Run([pictures], out, stream=stream)
    assert run.go() == 3
    assert run.encoded == 0
    assert stream.getvalue() == (out / "predictions.jsonl").read_bytes()
    assert contents(out) == contents(finished[1])


def test_a_changed_image_is_done_again_in_its_place(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    pictures, out = copied(finished, tmp_path)
    own = tmp_path / "in"
    shutil.copytree(pictures, own)
    Run([own], tmp_path / "before").go()
    os.utime(own / "5.png")  # touched only
    os.truncate(own / "sub" / "3.png", (own / "sub" / "3.png").stat().st_size)
    draw(own / "2.png", 9)
    (own / "7.png").unlink()  # gone: what it gave stays
    (own / "7.png").symlink_to(own / "nothing")
    run = Run([own], tmp_path / "before")
    assert run.go() == 3
    assert run.encoded == 1
    ids = [record.id for record in read_records(tmp_path / "before")]
    assert len(ids) == 14
    draw(own / "again.png", 7)
    (own / "again.png").rename(own / "7.png")
    Run([own], tmp_path / "fresh").go()
    assert contents(tmp_path / "before") == contents(tmp_path / "fresh")
    assert out.exists()


def test_a_mended_image_is_tried_again_without_being_asked(pictures: Path, tmp_path: Path) -> None:
    Run([pictures], tmp_path / "out").go()
    draw(pictures / "4.png", 4)
    run = Run([pictures], tmp_path / "out")
    assert run.go() == 0
    assert run.encoded == 1
    Run([pictures], tmp_path / "fresh").go()
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_retry_failed_does_only_what_failed(pictures: Path, tmp_path: Path) -> None:
    manifest = pictures / "m.jsonl"
    texts = [f'{{"image": "{n}.png", "expression": "x"}}' for n in (1, 2, 4, 5)]
    manifest.write_text("\n".join([texts[0], "{broken", *texts[1:]]))
    out = tmp_path / "out"
    assert Run([manifest], out).go() == 3
    same = Run([manifest], out, plan={"retry_failed": True})
    assert same.go() == 3
    assert same.encoded == 0
    assert len((out / "failures.jsonl").read_text().splitlines()) == 2
    draw(pictures / "4.png", 4)
    manifest.write_text("\n".join([texts[0], texts[2].replace("4", "7"), *texts[1:]]))
    run = Run([manifest], out, plan={"retry_failed": True})
    assert run.go() == 0
    assert run.encoded == 2
    Run([manifest], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_retry_that_is_cut_off_goes_on(pictures: Path, tmp_path: Path) -> None:
    for name in ("1", "2", "5"):
        (pictures / f"{name}.png").rename(pictures / f"{name}.png.away")
        (pictures / f"{name}.png").write_text("broken")
    out = tmp_path / "out"
    Run([pictures], out, plan={"limit": 6}).go()
    for name in ("1", "2", "5"):
        (pictures / f"{name}.png.away").rename(pictures / f"{name}.png")
    cut = Run([pictures], out, plan={"retry_failed": True})
    kill_at(cut.model, 2)
    with pytest.raises(Killed):
        cut.go()
    rest = Run([pictures], out, plan={"retry_failed": True})
    assert rest.go() == 3
    assert 1 <= rest.encoded <= 4  # what the cut one had done is not done again
    Run([pictures], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("image", range(7))
def test_killed_in_any_batch_and_resumed(
    finished: tuple[Path, Path], tmp_path: Path, image: int
) -> None:
    pictures, out = finished[0], tmp_path / "out"
    run = Run([pictures], out)
    kill_at(run.model, image)
    with pytest.raises(Killed):
        run.go()
    assert Run([pictures], out).go() == 3
    assert contents(out) == contents(finished[1])


def test_an_interrupted_splice_is_ended(finished: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, out = copied(finished, tmp_path)
    wanted = contents(out)
    with RunFolder(out) as folder:
        for name in (*FILES, LEDGER):
            shutil.move(out / name, folder.spliced(name))
        shutil.move(folder.spliced(FILES[0]), out / FILES[0])  # the first was moved, then a kill
        (folder.private / "splice").touch()
        folder.redo.write_bytes(b"done")
    with RunFolder(out) as folder:
        assert not folder.redo.exists()
    assert contents(out) == wanted
    with RunFolder(out) as folder:  # and one that was only prepared is dropped
        folder.spliced(LEDGER).write_bytes(b"half")
    RunFolder(out).close()
    assert Run([pictures], out).go() == 3
    assert contents(out) == wanted


# --- what is refused ------------------------------------------------------------------------------


def test_another_run_is_refused_by_name(finished: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, out = copied(finished, tmp_path)
    wanted = contents(out)
    base = Run([pictures], out)
    other_model = FakeModel()
    other_model.hash = "1" * 64
    for changed, text in (
        (replace(base, settings=replace(base.settings, threshold=0.25)), "threshold was 0.5"),
        (replace(base, settings=replace(base.settings, no_target_threshold=0.9)), "no_target"),
        (replace(base, model=other_model), "model was"),
        (replace(base, saving=Saving(False, False, MAX_PIXELS)), "save was"),
        (replace(base, plan={"shard": Shard(0, 2)}), "shard was"),
        (
            replace(base, e=["bright"]),
            "expressions changed: .* 8 that are not among them, and of 0",
        ),
        (replace(base, e=["bright", "another"]), "expressions changed"),
        (replace(base, inputs=[pictures / "1.png"]), "7 that are not among them, and of 1 that"),
    ):
        with pytest.raises(OutputError, match=text):
            changed.go()
        assert contents(out) == wanted


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing"):
        RunFolder(tmp_path / "out")
    assert not (tmp_path / "out").exists()  # no run was begun
    (tmp_path / "mine").mkdir()
    RunFolder(tmp_path / "mine").close()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file"):
            RunFolder(path)


def test_records_of_someone_else_are_not_written_over(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").write_text("mine\n")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="`risam predict` did not write"):
            Run([pictures], out, overwrite=overwrite).go()
    assert (out / "predictions.jsonl").read_text() == "mine\n"


def test_starting_anew_deletes_what_the_tool_wrote_and_nothing_else(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = Run([pictures], out)
    kill_at(killed.model, 5)
    with pytest.raises(Killed):
        killed.go()
    mine = [out / "notes.txt", out / "masks" / "mine.png", out / "masks" / "own" / "x.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert Run([pictures / "1.png"], out, e=["x"], overwrite=True).go() == 0
    written = contents(out)
    for path in mine:
        assert written.pop(str(path.relative_to(out))) == b"mine"
    Run([pictures / "1.png"], tmp_path / "fresh", e=["x"]).go()
    assert written == contents(tmp_path / "fresh")


def test_a_ledger_that_names_files_of_others_deletes_none(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = copied(finished, tmp_path)
    victim = tmp_path / "victim.png"
    lines = (out / LEDGER).read_bytes().splitlines(keepends=True)
    for name in ("masks/../../victim.png", str(victim), "victim.png", "../victim.png"):
        victim.write_text("mine")
        hostile = {**unseal(lines[1]), "files": [[name, 4, 0]]}
        (out / LEDGER).write_bytes(b"".join([lines[0], seal(hostile), *lines[2:]]))
        with RunFolder(out) as folder:
            folder.start_anew()
        assert victim.read_text() == "mine"
        _, out = copied(finished, tmp_path)


# --- faults ---------------------------------------------------------------------------------------


def test_too_many_failures_stop_the_run(pictures: Path, tmp_path: Path) -> None:
    for number in (1, 2, 5):
        (pictures / f"{number}.png").write_text("broken")
    out = tmp_path / "out"
    with pytest.raises(RisamError, match="more than max_failures 3") as caught:
        Run([pictures], out, plan={"max_failures": 3}).go()
    assert caught.value.exit_code == 1
    assert run_json(out)["status"] == "failed"
    assert Run([pictures], out).go() == 3
    Run([pictures], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")
    assert Run([pictures], tmp_path / "enough", plan={"max_failures": 8}).go() == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_batch(
    finished: tuple[Path, Path],
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures, out = finished[0], tmp_path / "out"
    run, send = Run([pictures], out), signals(monkeypatch)
    at_image(run, 2, lambda: send(number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="finished work is kept"):
        run.go()
    assert signal.getsignal(number) is before
    assert run_json(out)["status"] == "interrupted"
    assert 4 <= len(read_records(out)) < 14
    assert Run([pictures], out).go() == 3
    assert contents(out) == contents(finished[1])


def test_a_disk_that_fills_up_keeps_what_was_done(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, out = finished[0], tmp_path / "out"
    left = 9
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            Run([pictures], out).go()
    assert str(caught.value).endswith("continue with resume")
    assert Run([pictures], out).go() == 3
    assert contents(out) == contents(finished[1])


def test_a_reader_that_leaves_ends_the_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    class Gone(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 0:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(data)

    pictures, out = finished[0], tmp_path / "out"
    with pytest.raises(OutputError, match="the reader of stdout is gone"):
        Run([pictures], out, stream=Gone()).go()
    assert Run([pictures], out).go() == 3
    assert contents(out) == contents(finished[1])


def test_an_image_that_vanishes_between_listing_and_reading(pictures: Path, tmp_path: Path) -> None:
    """Two images at most are read ahead: the last ones here are listed, the folder is not yet."""
    run = Run(
        [pictures], tmp_path / "out", settings=PredictSettings(CPU, batch_size=1, lookahead=2)
    )

    def vanish(pixels: torch.Tensor) -> None:
        for name in ("5.png", "7.png"):
            (pictures / name).unlink(missing_ok=True)
        shutil.rmtree(pictures / "sub", ignore_errors=True)

    run.model.network.before_encode = vanish
    assert run.go() == 3
    rows = [json.loads(x) for x in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    *files, folder = rows
    assert [row["id"] for row in files] == [
        f"{pictures}/{n}.png#{k}" for n in (4, 5, 7) for k in (0, 1)
    ]
    assert all("no such file" in row["message"] for row in files[2:])
    assert folder["message"].startswith(f"{pictures / 'sub'}: No such file")
    assert len(read_records(tmp_path / "out")) == 4


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_shards_merge_to_the_whole(finished: tuple[Path, Path], tmp_path: Path, count: int) -> None:
    pictures, whole = finished
    folders = [tmp_path / f"part{index}" for index in range(count)]
    encoded = 0
    for index, folder in enumerate(folders):
        run = Run([pictures], folder, plan={"shard": Shard(index, count)})
        assert run.go() in (0, 3)
        encoded += run.encoded
    assert encoded == 7
    merge_parts(find_parts(folders), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(whole)
