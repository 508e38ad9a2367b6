"""What befalls a training run: kills, Ctrl-C, a full disk, NaN. Real processes, real signals."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.train_cases import assert_same_run, everything, fork_runs, write_config
from support.training_runs import last_weights, rows

from risam_cli.errors import ModelError
from risam_cli.training.checkpoint import Checkpoints, Place, read_state
from risam_cli.training.loop import clear_leftovers

STEPS = 14  # of the unbroken run: 6 and 8
LOGGED = 6 + 3 + 8 + 4 + 2  # steps, validations, the stop, the average


class Jobs:
    """Runs of the same configuration into folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(
            folder / "train.yaml", everything(folder / "data", folder / "unbroken")
        )
        self.jobs: list[dict[str, Any]] = []

    def add(self, name: str, *options: str, **what: Any) -> None:
        output = self.folder / name
        self.jobs.append(
            {"args": ["train", self.config, "--set", f"output={output}", *options], **what}
        )

    def kill(self, name: str, signal: str, lines: int, wait: float = 0.0) -> None:
        """A run that is sent a signal once its log has some lines, and the run that goes on."""
        log = str(self.folder / name / "metrics.jsonl")
        self.add(name, kill={"signal": signal, "file": log, "lines": lines, "wait": wait})
        self.add(name, "--resume")

    def run(self) -> list[dict[str, Any]]:
        jobs, self.jobs = self.jobs, []
        return fork_runs(jobs, self.folder)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def told(jobs: Jobs) -> list[dict[str, Any]]:
    """What the processes said: an unbroken run, one torn in its third checkpoint, one stopped."""
    jobs.add("unbroken")
    jobs.add("torn", in_checkpoint=4)
    jobs.add("torn", "--resume")
    jobs.kill("stopped", "SIGTERM", 14)
    jobs.add("nan", spoil=9)
    return jobs.run()


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_bits(
    jobs: Jobs, told: list[dict[str, Any]]
) -> None:
    assert [one["codes"] for one in told[:3]] == [[0], [-9], [0]]
    assert len(rows(jobs.folder / "unbroken")) == LOGGED
    assert_same_run(jobs.folder / "torn", jobs.folder / "unbroken")
    assert not list((jobs.folder / "torn").rglob("*.part"))


def test_sigterm_ends_after_the_step_with_a_checkpoint(
    jobs: Jobs, told: list[dict[str, Any]]
) -> None:
    stopped, resumed = told[3], told[4]
    assert (stopped["codes"], resumed["codes"]) == ([130], [0])
    last = stopped["stderr"][0].splitlines()[-1]
    assert last.startswith("error: interrupted after step ")
    assert last.endswith("continue with --resume")
    # The checkpoint is of the very step, so that nothing is done again.
    step = int(last.split("after step ")[1].split(";")[0])
    assert f"resuming at stage 2, step {step}" in resumed["stderr"][0]
    assert_same_run(jobs.folder / "stopped", jobs.folder / "unbroken")


def test_a_loss_that_is_nan_names_its_images_and_keeps_the_last_good_checkpoint(
    jobs: Jobs, told: list[dict[str, Any]]
) -> None:
    """Nine parts into the run is the fifth step's first, so one or two of its three images."""
    assert told[5]["codes"] == [1]
    last = told[5]["stderr"][0].splitlines()[-1]
    assert last.startswith("error: loss is nan at stage 'fusion', step 4, in the batch of images ")
    named = last.split("images ")[1].split("; lower")[0]
    assert 1 <= named.count(".png") <= 2
    assert last.endswith(f"the last good checkpoint is {jobs.folder}/nan/checkpoints/last.pt")
    assert all(torch.isfinite(value).all() for value in last_weights(jobs.folder / "nan").values())
    page = (jobs.folder / "nan" / "training.html").read_text()
    assert "Stopped early: loss is nan" in page


def test_a_full_disk_leaves_the_last_good_checkpoint(
    jobs: Jobs, told: list[dict[str, Any]]
) -> None:
    """The limit on a file's size is the first stage's checkpoints', which the second's exceed."""
    stage_end = jobs.folder / "full" / "checkpoints" / "last.pt"
    jobs.add("full", file_limit=1_000_000)
    jobs.add("full", "--resume")
    full, resumed = jobs.run()
    assert (full["codes"], resumed["codes"]) == ([1], [0])
    last = full["stderr"][0].splitlines()[-1]
    assert last.startswith(f"error: cannot write {stage_end}: ")
    assert last.endswith("check disk space and permissions")
    assert "Traceback" not in full["stderr"][0]
    assert "resuming at stage " in resumed["stderr"][0]
    assert_same_run(jobs.folder / "full", jobs.folder / "unbroken")


@pytest.mark.slow
def test_kills_at_random_moments_and_ctrl_c_change_nothing(
    jobs: Jobs, told: list[dict[str, Any]]
) -> None:
    """Other moments each time; what is drawn is in the assertion's message."""
    chance = random.Random()
    moments = [(chance.randrange(1, LOGGED), chance.random() * 0.05) for _ in range(3)]
    for number, (lines, wait) in enumerate(moments):
        jobs.kill(f"killed {number}", "SIGKILL", lines, wait)
    jobs.kill("ctrl-c", "SIGINT", 5)
    codes = [one["codes"][0] for one in jobs.run()]
    # A run that was done before the signal came is no failure of the run.
    assert codes[1::2] == [0, 0, 0, 0], moments
    assert all(code in (-9, 0) for code in codes[:6:2]), moments
    assert codes[6] == 130
    for name in ("killed 0", "killed 1", "killed 2", "ctrl-c"):
        assert_same_run(jobs.folder / name, jobs.folder / "unbroken")


# --- what a kill leaves half done -----------------------------------------------------------------


def test_a_model_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    old, half = tmp_path / ".best-old", tmp_path / ".best-x7"
    for folder in (old, half, tmp_path / "checkpoints" / "kept"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(folder.name)
    part = tmp_path / "checkpoints" / ".last.pt.part"
    part.write_text("half")
    clear_leftovers(tmp_path)
    assert (tmp_path / "best" / "model.safetensors").read_text() == ".best-old"
    assert {p.name for p in tmp_path.iterdir()} == {"best", "checkpoints"}
    assert not part.exists()
    # One that is whole stays, and the old one goes.
    shutil.copytree(tmp_path / "best", old)
    (old / "model.safetensors").write_text("older")
    clear_leftovers(tmp_path)
    assert (tmp_path / "best" / "model.safetensors").read_text() == ".best-old"
    assert not old.exists()


def test_files_that_a_user_puts_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "last.pt").touch()
    own = [tmp_path / name for name in ("stage1-step00000900 (copy).pt", "stage1-stepped.pt")]
    for path in own:
        path.touch()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.follow(Place(step=step))
    assert [path.name for path in checkpoints.others()] == [
        "stage1-step00000010.pt", "stage1-step00000015.pt",
    ]  # fmt: skip
    assert all(path.exists() for path in own)


def test_a_damaged_last_checkpoint_points_to_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"PK torn")
    for name in ("stage1-step00000900.pt", "stage2-step00000100.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError) as raised:
        read_state(tmp_path / "last.pt", ["x"])
    assert raised.value.fix == "put stage2-step00000100.pt in its place"
