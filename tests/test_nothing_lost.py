"""Attacks on what is promised of output folders; each once ended wrong, most with exit code 0."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.paths import REPO
from support.predict_runs import CPU, Run, contents, draw_pictures
from support.training_runs import RAW
from support.training_runs import run as training_run

from risam_cli.cli import main
from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import ModelError, OutputError
from risam_cli.files import folder as files_folder
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.files.write import own_file, write_file
from risam_cli.inference.pipeline import PredictSettings
from risam_cli.runs import writer
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import read_redone
from risam_cli.runs.writer import RunWriter
from risam_cli.training.checkpoint import Checkpoints, Place, Untrained
from risam_cli.weights.folder import BUNDLED, damaged_files, replace_config
from risam_cli.weights.torch_files import load_plain, require_sealed, seal_file


class Cut(BaseException):
    """As a kill: nothing catches it."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def change(path: Path, shade: int) -> None:
    with Image.open(path) as before:
        size = before.size
    Image.new("RGB", size, (shade, shade, 40)).save(path)


def cut_redo(monkeypatch: pytest.MonkeyPatch, run: Run, at: str) -> None:
    """A run that is killed at a step of its writer while it does things again."""
    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, at, lambda self, *more: (_ for _ in ()).throw(Cut))
        patched.setattr(RunFolder, "close", lambda self: self._lock.release())
        with pytest.raises(Cut):
            run.go()


# --- a redo ---------------------------------------------------------------------------------------


def test_a_torn_line_of_the_redo_journal_hides_none_that_follow(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    Run([pictures], out).go()
    for number in (1, 2, 5):
        change(pictures / f"{number}.png", 60 + number)
    cut_redo(monkeypatch, Run([pictures], out), "_open_files")
    journal = out / ".risam" / "redo.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    assert len(whole) == 3
    journal.write_bytes(whole[0] + whole[1][: len(whole[1]) // 2])  # as a full disk leaves it
    Run([pictures], out).go()
    Run([pictures], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_torn_line_is_skipped_by_the_reader_itself(tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    Run([pictures], out).go()
    change(pictures / "1.png", 61)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_redo(monkeypatch, Run([pictures], out), "_open_files")
    journal = out / ".risam" / "redo.jsonl"
    line = journal.read_bytes()
    journal.write_bytes(line[:50] + b"\n" + line)
    assert [start for _, start in read_redone(journal)] == [51]


def test_a_record_never_names_a_mask_that_a_kill_kept_from_its_place(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed items, tried again: the kill falls between the journal and the masks."""
    out = tmp_path / "out"
    tight = PredictSettings(CPU, batch_size=2, lookahead=16, max_pixels=24 * 15)
    Run([pictures], out, settings=tight).go()
    cut_redo(monkeypatch, Run([pictures], out), "_publish")
    assert (out / ".risam" / "redo.jsonl").stat().st_size
    Run([pictures], out).go()
    for line in (out / "predictions.jsonl").read_text().splitlines():
        assert (out / json.loads(line)["mask"]).is_file()
    Run([pictures], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mask_of_an_image_that_breaks_after_a_kill_does_not_stay(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The kill falls between the two masks of one image."""
    out = tmp_path / "out"
    place = OutputFolder.place

    def first_only(self: OutputFolder, moves: Any, **more: Any) -> None:
        moves = list(moves)
        if any(name.startswith("masks/") for _, name in moves):
            place(self, moves[:1], **more)
            raise Cut
        place(self, moves, **more)

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "place", first_only)
        patched.setattr(RunFolder, "close", lambda self: self._lock.release())
        with pytest.raises(Cut):
            Run([pictures], out).go()
    (mask,) = (out / "masks").rglob("*.png")
    broken = next(path for path in pictures.rglob("*.png") if path.name[0] == mask.name[0])
    broken.write_text("no image any more")
    Run([pictures], out, overwrite=overwrite).go()
    Run([pictures], tmp_path / "fresh").go()
    assert contents(out) == contents(tmp_path / "fresh")
    assert not mask.exists()


@pytest.mark.parametrize("explicit", [False, True])
def test_an_interrupted_retry_is_gone_on_with(
    pictures: Path, tmp_path: Path, explicit: bool
) -> None:
    out = tmp_path / "out"
    tight = PredictSettings(CPU, batch_size=1, lookahead=2, max_pixels=24 * 13)
    wide = PredictSettings(CPU, batch_size=1, lookahead=2, max_pixels=MAX_PIXELS)
    Run([pictures], out, settings=tight).go()
    before = (out / "failures.jsonl").read_bytes().count(b"\n")
    stopped = Run([pictures], out, settings=wide, plan={"retry_failed": explicit})
    with pytest.MonkeyPatch.context() as patched:
        write = RunWriter._write_inside

        def counted(self: RunWriter, done: Any) -> None:
            write(self, done)
            raise OutputError("the disk is full") from OSError(28, "No space left on device")

        patched.setattr(RunWriter, "_write_inside", counted)
        patched.setattr(writer, "_AT_ONCE", 1)
        with pytest.raises(OutputError, match="continue with resume"):
            stopped.go()
    assert len(list(read_redone(out / ".risam" / "redo.jsonl"))) == 1 < before / 2
    assert Run([pictures], out, settings=wide).go() == 3  # the one that is not an image
    Run([pictures], tmp_path / "fresh", settings=wide).go()
    assert contents(out) == contents(tmp_path / "fresh")
    assert not (out / ".risam" / "retry").exists()


def test_every_flipped_bit_of_a_ledger_is_noticed(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run([pictures], out).go()
    wanted = contents(out)
    whole = (out / "ledger.jsonl").read_bytes()
    second = whole.index(b"\n") + 1
    chance = random.Random(5)
    for _ in range(12):
        spoilt = bytearray(whole)
        spoilt[chance.randrange(second, len(whole))] ^= 1 << chance.randrange(8)
        (out / "ledger.jsonl").write_bytes(spoilt)
        Run([pictures], out).go()
        assert contents(out) == wanted
        assert (out / "ledger.jsonl").read_bytes() == whole


# --- files of others ------------------------------------------------------------------------------


MARKS = {
    "predict": "ledger.jsonl",
    "eval": "report.json",
    "train": "config.resolved.yaml",
    "export-masks": "export.json",
}


@pytest.mark.parametrize("theirs", MARKS)
@pytest.mark.parametrize("mine", MARKS)
def test_no_command_touches_the_folder_of_another(tmp_path: Path, mine: str, theirs: str) -> None:
    (tmp_path / MARKS[theirs]).write_text('{"kind": "coco"}')
    (tmp_path / "failures.jsonl").write_text("theirs\n")
    if mine == theirs:
        OutputFolder(tmp_path, mine, ["failures.jsonl"]).close()
    else:
        with pytest.raises(OutputError, match=f"holds files of `risam {theirs}`"):
            OutputFolder(tmp_path, mine, ["failures.jsonl"])
    assert (tmp_path / "failures.jsonl").read_text() == "theirs\n"


def test_predict_and_eval_leave_the_failures_of_an_export_alone(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / "export.json").write_text('{"kind": "yolo", "complete": true}')
    (out / "failures.jsonl").write_text("theirs\n")
    image = str(pictures / "1.png")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert main(["predict", image, "-e", "x", "-o", str(out), "--device", "cpu", *more]) == 1
        assert "export-masks" in capsys.readouterr().err
    records = tmp_path / "p.jsonl"
    records.write_text("")
    sample = str(REPO / "sample_data" / "coco.json")
    asked = ["eval", "--dataset", "coco", "--root", sample, "--predictions", str(records)]
    for more in ([], ["--overwrite"]):
        assert main([*asked, "-o", str(out), *more]) == 1
        assert "export-masks" in capsys.readouterr().err
    assert (out / "failures.jsonl").read_text() == "theirs\n"


def test_a_file_that_nobody_signed_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="`risam eval` did not write"):
        OutputFolder(tmp_path, "eval", ["failures.jsonl"])
    assert (tmp_path / "failures.jsonl").read_text() == "mine\n"


def test_a_hard_link_is_not_written_through(pictures: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    Run([pictures], out, plan={"limit": 3}).go()
    shutil.copytree(out, kept, copy_function=os.link)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    Run([pictures], out).go()
    change(pictures / "1.png", 77)
    Run([pictures], out).go()
    Run([pictures], out, overwrite=True).go()
    assert {path: path.read_bytes() for path in before} == before


def test_writing_replaces_and_follows_no_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    for link in (os.symlink, os.link):
        mine = tmp_path / link.__name__
        link(theirs, mine)
        write_file(mine, "mine")
        assert (mine.read_text(), theirs.read_text()) == ("mine", "theirs")
        part = tmp_path / f".{mine.name}.part"
        link(theirs, part)
        write_file(mine, "again")
        assert theirs.read_text() == "theirs"
    os.link(theirs, tmp_path / "other")
    own_file(theirs)
    assert theirs.stat().st_nlink == 1
    assert theirs.read_text() == "theirs"


def test_masks_that_become_a_link_during_a_run_lead_nowhere(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    away.mkdir()
    append = RunWriter._append

    def swapped(self: RunWriter, done: Any) -> None:
        append(self, done)
        if (out / "masks").is_dir() and not (out / "masks").is_symlink():
            (out / "masks").rename(tmp_path / "moved")
            (out / "masks").symlink_to(away)

    monkeypatch.setattr(RunWriter, "_append", swapped)
    settings = PredictSettings(CPU, batch_size=1, lookahead=2)
    monkeypatch.setattr(writer, "_AT_ONCE", 1)
    with pytest.raises(OutputError, match="masks"):
        Run([pictures], out, settings=settings).go()
    assert list(away.iterdir()) == []


def test_a_folder_that_cannot_be_begun_is_told_of_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *more: Any, **by: Any) -> None:
        raise OutputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(files_folder, "write_file", full)
    with pytest.raises(OutputError, match=r"made_by: No space"):
        RunFolder(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- checksums ------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": {"w": torch.arange(900.0)}, "place": {"step": 3}}, path)
    seal_file(path)
    require_sealed(path)
    assert load_plain(path)["place"] == {"step": 3}
    whole = path.read_bytes()
    chance = random.Random(1)
    for _ in range(300):
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(ModelError, match="checksum"):
            require_sealed(path)
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="checksum"):
            require_sealed(path)


def test_every_flipped_bit_of_a_kept_line_is_noticed() -> None:
    """As answers, ledgers and journals are written."""
    record = {"id": "a é \ud800", "score": 0.5, "mask": {"counts": "abc", "size": [4, 5]}}
    line = seal(record)
    assert unseal(line) == record
    for place in range(len(line)):
        for bit in range(8):
            spoilt = bytearray(line)
            spoilt[place] ^= 1 << bit
            with pytest.raises(ValueError, match="checksum"):
                unseal(bytes(spoilt))
    for cut in range(len(line)):
        with pytest.raises(ValueError, match="checksum"):
            unseal(line[:cut])


def test_a_lost_checkpoint_is_told_of_and_an_earlier_one_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.to_resume() is None  # a run that was cut before its first
    model = torch.nn.Linear(2, 2)
    untrained = Untrained(model)
    for step in (1, 2):
        checkpoints.save(Place(0, step), "hash", model, untrained)
    assert checkpoints.to_resume() == tmp_path / "last.pt"
    (tmp_path / "last.pt").unlink()
    assert checkpoints.to_resume() == tmp_path / "stage1-step00000002.pt"
    assert "last.pt is missing; continuing from stage1-step00000002.pt" in capsys.readouterr().err
    for path in checkpoints.others():
        path.unlink()
    with pytest.raises(ModelError, match="no earlier checkpoint"):
        checkpoints.to_resume()


def test_a_save_that_is_cut_behind_its_checkpoint_is_ended_by_the_run_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "keep_last": 2, "averaging": {"count": 2, "of": "last"}, "validate_every": 1,
        "checkpoint_every": 1, "stages": [{**RAW["stages"][1], "steps": 3, "warmup": 1}],
    }  # fmt: skip
    training_run(tmp_path / "whole", **changes)
    out = tmp_path / "cut"
    follow = Checkpoints.follow

    def cut(self: Checkpoints, place: Place) -> None:
        if place.averaged:  # the last one of the run
            raise Cut
        follow(self, place)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "follow", cut)
        with pytest.raises(Cut):
            training_run(out, **changes)
    assert training_run(out, resume=True, **changes) == out / "best"
    names = [
        sorted(path.relative_to(one).as_posix() for path in (one / "checkpoints").rglob("*"))
        for one in (out, tmp_path / "whole")
    ]
    assert names[0] == names[1]
    progress = "checkpoints/progress.json"
    assert (out / progress).read_text() == (tmp_path / "whole" / progress).read_text()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_models_verify_notices_a_flipped_bit(tmp_path: Path, name: str, capsys: Any) -> None:
    folder = shutil.copytree(BUNDLED / "refshapes-tiny", tmp_path / "model")
    assert damaged_files(folder) == []
    data = bytearray((folder / name).read_bytes())
    # A digit that becomes another; a weight that remains a number.
    value = data.find(b'"no_target_threshold": 0.')
    data[value + 25 if value >= 0 else -9] ^= 1
    (folder / name).write_bytes(data)
    assert main(["models", "verify", str(folder)]) == 1
    assert f"{name} is damaged or was changed" in capsys.readouterr().err


def test_no_model_is_made_of_one_with_a_flipped_bit(tmp_path: Path, capsys: Any) -> None:
    """It would get checksums of its own, which hide the damage."""
    folder = shutil.copytree(BUNDLED / "refshapes-tiny", tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    settings = REPO / "configs/finetune_own_data.yaml"
    train = ["train", str(settings), "--set", f"train.annotations={REPO}/sample_data/coco.json"]
    train += ["--set", f"output={tmp_path}/out", "--set", "init_from=null", "--set"]
    encoder = f"init_encoder_from={folder}"
    for command in (
        ["models", "export", str(folder), "-o", str(tmp_path / "out")],
        ["models", "export", str(folder), "--merged", "-o", str(tmp_path / "out")],
        [*train, f"init_from={folder}"],
        [*train, encoder, "--set", "model=" + json.dumps(_settings_of(folder))],
    ):
        assert main(command) == 1
        assert "model.safetensors is damaged or was changed" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def _settings_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["model"]


def test_a_threshold_that_is_stored_is_no_damage(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLED / "refshapes-tiny", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["no_target_threshold"] = 0.25
    replace_config(folder, config)
    assert damaged_files(folder) == []


# --- kills ----------------------------------------------------------------------------------------


def test_a_command_is_cut_where_the_switch_says(tmp_path: Path, pictures: Path) -> None:
    """The real command as a process of its own, killed by ``sitecustomize`` and gone on with."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    predict = [sys.executable, "-m", "risam_cli", "-q", "predict", str(pictures), "-e", "x"]
    predict += ["--device", "cpu", "--resume", "-o"]
    path = os.pathsep.join([str(REPO / "benchmarks" / "killer"), str(REPO)])
    told = {**os.environ, "PYTHONPATH": path, "RISAM_KILL_IN": str(out), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*predict, whole], env={**told, "RISAM_KILL": "0"}).returncode == 3
    for number in (9, 31):
        cut = subprocess.run([*predict, out], env={**told, "RISAM_KILL": str(number)})
        assert cut.returncode == -9
    assert subprocess.run([*predict, out], env={**told, "RISAM_KILL": "0"}).returncode == 3
    assert contents(out) == contents(whole)


def test_a_run_that_was_ended_before_it_had_a_ledger_is_started_over(
    pictures: Path, tmp_path: Path
) -> None:
    """Its files are empty; records without a ledger are somebody's, and are left alone."""
    out = tmp_path / "out"
    run = Run([pictures], out, overwrite=True)
    run.go()
    whole = contents(out)
    for name in ("failures.jsonl", "run.json", "ledger.jsonl"):
        (out / name).unlink()
    records = (out / "predictions.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"no ledger\.jsonl that says what else"):
        run.go()
    assert (out / "predictions.jsonl").read_bytes() == records
    (out / "predictions.jsonl").write_bytes(b"")
    run.go()
    assert contents(out) == whole
