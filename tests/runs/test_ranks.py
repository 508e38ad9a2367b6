"""The processes of torchrun: one folder at the end, the bytes and figures of a single process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPO
from support.records import contents

from risam_cli.cli import main
from risam_cli.runs import ranks

Rank = Callable[..., int]
ASK = ("-e", "the red circle", "-e", "star")


@pytest.fixture
def rank(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """``risam predict`` in this process as one of torchrun's; gives the exit code."""
    monkeypatch.setattr(ranks, "_GRACE", 0.01)
    monkeypatch.setenv("MASTER_PORT", "29500")

    def call(
        number: int | None, *args: str | Path, world: int = 2, start: int = 0, port: int = 29500
    ) -> int:
        with monkeypatch.context() as patch:
            patch.setenv("MASTER_PORT", str(port))
            if number is not None:
                patch.setenv("RANK", str(number))
                patch.setenv("WORLD_SIZE", str(world))
                patch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
            return main(
                ["predict", *map(str, args), "--model", str(model_folder), "--device", "cpu"]
            )

    return call


def test_the_last_of_the_processes_leaves_one_folder(
    rank: Rank, tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tiny_images / "b.jpg").write_text("broken")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert rank(None, tiny_images, *ASK, "-o", whole) == 3
    capfd.readouterr()
    for number in (2, 0):
        # What failed is no reason for torchrun to end the others.
        assert rank(number, tiny_images, *ASK, "-o", out, "--jsonl", "-", world=3) == 0
        assert not (out / "predictions.jsonl").exists()
    assert capfd.readouterr().out == ""
    assert rank(1, tiny_images, *ASK, "-o", out, "--jsonl", "-", world=3) == 3
    said = capfd.readouterr()
    assert said.out == (whole / "predictions.jsonl").read_text()
    assert "10 records of 3 processes" in said.err
    assert contents(out) == contents(whole)
    assert not list(out.glob("shard-*"))
    # It is a run like any other: torchrun or one process go on with it, or are refused.
    assert rank(1, tiny_images, *ASK, "-o", out) == 1
    assert "holds another run" in capfd.readouterr().err
    assert rank(1, tiny_images, *ASK, "-o", out, "--resume") == 0
    assert rank(0, tiny_images, *ASK, "-o", out, "--resume") == 3
    assert rank(None, tiny_images, *ASK, "-o", out, "--resume") == 3
    assert contents(out) == contents(whole)


def test_parts_can_be_kept(
    rank: Rank, tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert rank(None, tiny_images, *ASK, "-o", whole) == 0
    for number in (0, 1):
        assert rank(number, tiny_images, *ASK, "-o", out, "--no-merge") == 0
    names = ["shard-00000-of-00002", "shard-00001-of-00002"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert main(["merge", str(out), "-o", str(tmp_path / "merged")]) == 0
    assert contents(tmp_path / "merged") == contents(whole)
    for number, world in ((0, 3), (None, 1)):
        assert rank(number, tiny_images, *ASK, "-o", out, world=world) == 1
        assert "holds the parts of a run in 2 processes" in capfd.readouterr().err
    # With --resume and without --no-merge they come together after all.
    assert [rank(n, tiny_images, *ASK, "-o", out, "--resume") for n in (0, 1)] == [0, 0]
    assert contents(out) == contents(whole)
    # --overwrite: whatever was there goes, parts of other numbers too.
    assert rank(0, tiny_images, "-e", "ring", "-o", out, "--overwrite", world=4) == 0
    assert [path.name for path in out.glob("[!.]*")] == ["shard-00000-of-00004"]
    assert rank(None, tiny_images, *ASK, "-o", out, "--overwrite") == 0
    assert contents(out) == contents(whole)


def test_a_finished_part_of_an_earlier_start_does_not_count(
    rank: Rank, tiny_images: Path, tmp_path: Path
) -> None:
    """Or one process would take a part away that another is about to look through."""
    out = tmp_path / "out"
    for number in (0, 1):
        assert rank(number, tiny_images, *ASK, "-o", out, "--no-merge") == 0
    assert rank(0, tiny_images, *ASK, "-o", out, "--resume", port=1) == 0
    assert not (out / "predictions.jsonl").exists()
    assert rank(1, tiny_images, *ASK, "-o", out, "--resume", port=1) == 0
    assert (out / "predictions.jsonl").exists()


def test_after_a_restart_what_was_begun_goes_on(
    rank: Rank, tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert rank(None, tiny_images, *ASK, "-o", whole) == 0
    assert rank(None, tiny_images, "-e", "other", "-o", out) == 0
    # A folder that held another run is refused after the restart as before it.
    assert [rank(0, tiny_images, *ASK, "-o", out, start=start) for start in (0, 1)] == [1, 1]
    capfd.readouterr()
    assert rank(0, tiny_images, *ASK, "-o", out, "--overwrite") == 0
    before = (out / "shard-00000-of-00002" / "predictions.jsonl").stat()
    # Process 1 died before it began; both are started again, by the same words.
    assert rank(0, tiny_images, *ASK, "-o", out, "--overwrite", start=1) == 0
    assert (out / "shard-00000-of-00002" / "predictions.jsonl").stat().st_ino == before.st_ino
    assert rank(1, tiny_images, *ASK, "-o", out, "--overwrite", start=1) == 0
    assert contents(out) == contents(whole)
    # Once more, because the last one failed after all: nothing is lost, nothing is done anew.
    inode = (out / "predictions.jsonl").stat().st_ino
    for number in (0, 1):
        assert rank(number, tiny_images, *ASK, "-o", out, "--overwrite", start=2) == 0
    assert (out / "predictions.jsonl").stat().st_ino == inode


def test_processes_that_do_not_work_alike_are_told_in_one_line(
    rank: Rank,
    tiny_images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert rank(0, tiny_images, *ASK, "-o", out, "-q") == 0
    assert rank(1, tiny_images, *ASK, "-o", out, "-q", "--threshold", "0.25") == 2
    assert [
        line
        for line in capfd.readouterr().err.splitlines()
        if "processes of this run differ" in line
    ] == [
        "error: process 1 of 2: the processes of this run differ: threshold is 0.5 and "
        "0.25 (process 0 and this one); start all of them with the same options, model and "
        "installation"
    ]
    assert rank(1, tiny_images, *ASK, "-o", out) == 0  # nothing is left of what was refused
    assert (out / "predictions.jsonl").exists()
    out = tmp_path / "versions"
    assert rank(0, tiny_images, *ASK, "-o", out) == 0
    monkeypatch.setattr("risam_cli.runs.run.__version__", "0.0.9")
    assert rank(1, tiny_images, *ASK, "-o", out) == 2
    assert "risam is '0.1.0' and '0.0.9'" in capfd.readouterr().err
    assert not (out / "predictions.jsonl").exists()
    # Parts that were made so are refused by a merge, too.
    assert rank(1, tiny_images, *ASK, "-o", out, "--resume", port=3) == 0
    assert main(["merge", str(out), "-o", str(tmp_path / "merged")]) == 1
    assert "risam is '0.1.0' and '0.0.9'" in capfd.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_what_one_process_alone_can_read_is_refused(
    rank: Rank, tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert rank(0, "-", *ASK, "-o", out) == 2
    assert "stdin and pipes can be read by one process" in capfd.readouterr().err
    assert rank(0, tiny_images, *ASK, "-o", out, "--no-merge", "--jsonl", "-") == 2
    assert rank(1, tiny_images, *ASK, "-o", out, "--dry-run") == 0
    assert capfd.readouterr().out == ""
    assert rank(0, tiny_images, *ASK, "-o", out, "--dry-run") == 0
    assert "6 images, 12 records to make" in capfd.readouterr().out
    assert not out.exists()


def test_parts_that_go_on_need_no_expressions_and_are_counted(
    rank: Rank, tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    for number in range(2):
        assert rank(number, tiny_images, *ASK, "-o", whole) == 0
    assert rank(0, tiny_images, *ASK, "-o", out) == 0
    capfd.readouterr()
    assert rank(0, tiny_images, "-o", out, "--resume", "--dry-run", port=2) == 0
    done = int(re.findall(r"(\d+) done already", capfd.readouterr().out)[0])
    assert 0 < done < 12
    for number in range(2):
        assert rank(number, tiny_images, "-o", out, "--resume", port=3) == 0
    names = ("predictions.jsonl", "failures.jsonl", "ledger.jsonl")
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


# --- real processes -------------------------------------------------------------------------------


def torchrun(world: int, *words: str | Path, script: Path | None = None) -> Any:
    program = Path(sys.executable).with_name("torchrun")
    what = ["-m", "risam_cli"] if script is None else [str(script)]
    return subprocess.run(
        [
            *(program, "--standalone", "--nproc-per-node", str(world), "--max-restarts", "1"),
            *(*what, *map(str, words)),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_torchrun_gives_the_bytes_and_figures_of_one_process(
    world: int, model_folder: Path, tiny_images: Path, tmp_path: Path
) -> None:
    model = ["--model", model_folder, "--device", "cpu"]
    asked = ["predict", tiny_images, *ASK, "--save", "png,html", *model, "-o"]
    assert main([*map(str, asked), str(tmp_path / "whole")]) == 0
    done = torchrun(world, *asked, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    scored = ["eval", "--dataset", "refshapes", "--split", "val", "--limit", "150", *model, "-o"]
    assert main([*map(str, scored), str(tmp_path / "one")]) == 0
    done = torchrun(world, *scored, tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "many") == figures(tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_and_goes_on(
    model_folder: Path, tiny_images: Path, tmp_path: Path
) -> None:
    model = ["--model", model_folder, "--device", "cpu"]
    asked = ["predict", tiny_images, *ASK, *model, "-o"]
    assert main([*map(str, asked), str(tmp_path / "whole")]) == 0
    script = REPO / "tests" / "support" / "dying_rank.py"
    done = torchrun(2, "1", "0", *asked, tmp_path / "out", script=script)
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    scored = ["eval", "--dataset", "refshapes", "--split", "val", "--limit", "150", *model, "-o"]
    assert main([*map(str, scored), str(tmp_path / "one")]) == 0
    done = torchrun(2, "1", "5", *scored, tmp_path / "two", script=script)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "two") == figures(tmp_path / "one")


def figures(folder: Path) -> Any:
    report = json.loads((folder / "report.json").read_text())
    rows = (folder / "per_expression.jsonl").read_bytes()
    return report["figures"], report["slices"], report["counts"], rows
