"""``risam merge``: shards come together to the bytes of one run, or are refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from risam_cli.cli import main
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.runs.folder import RunFolder

SHARDS = 3


def merge(*args: str | Path) -> int:
    return main(["merge", *map(str, args)])


def predict(model: Path, inputs: Path, output: Path, *more: str) -> None:
    code = main(
        ["predict", str(inputs), "--model", str(model), "-o", str(output), "--device", "cpu",
         "--save", "png,overlay", "--workers", "0", "-q", *more]
    )  # fmt: skip
    assert code == 3  # one image is broken on purpose


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """One run as a whole, and as three shards."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(1)
    rows = []
    (folder / "images" / "sub").mkdir(parents=True)
    for k in range(8):
        name = f"images/{'sub/' if k % 2 else ''}{k}.png"
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"image": name, "expressions": ["the red circle", f"object {k}"][: 1 + k % 2]})
    (folder / "images" / "broken.png").write_text("no image")
    rows.insert(3, {"image": "images/broken.png", "expression": "the red circle"})
    manifest = folder / "list.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict(model_folder, manifest, folder / "whole")
    for k in range(SHARDS):
        code = main(
            ["predict", str(manifest), "--model", str(model_folder), "-o", str(folder / f"part{k}"),
             "--device", "cpu", "--save", "png,overlay", "--workers", "0", "-q",
             "--shard", f"{k}/{SHARDS}"]
        )  # fmt: skip
        assert code in {0, 3}
    return folder


@pytest.fixture
def parts(runs, tmp_path):
    """Copies of the shards that a test may damage."""
    for k in range(SHARDS):
        shutil.copytree(runs / f"part{k}", tmp_path / f"part{k}")
    return [tmp_path / f"part{k}" for k in range(SHARDS)]


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for run.json, which holds times, and the tool's own folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != "run.json"
        and not path.relative_to(folder).parts[0].startswith(".")
    }


def test_merged_shards_equal_the_whole_run_byte_for_byte(runs, tmp_path, capsys):
    order = [runs / "part2", runs / "part0", runs / "part1"]
    assert merge(*order, "-o", tmp_path / "out", "--json") == 3
    whole = files(runs / "whole")
    assert files(tmp_path / "out") == whole
    assert {"predictions.jsonl", "failures.jsonl", "ledger.jsonl"} < whole.keys()
    assert any(name.startswith("masks/") for name in whole)
    assert any(name.startswith("overlays/") for name in whole)
    told = json.loads(capsys.readouterr().out)
    assert (told["shards"], told["inputs"], told["records"], told["failures"]) == (3, 9, 12, 1)


def test_the_merged_run_says_what_it_is_and_can_be_resumed(runs, model_folder, tmp_path):
    out = tmp_path / "out"
    assert merge(*(runs / f"part{k}" for k in range(SHARDS)), "-o", out) == 3
    ours = json.loads((out / "run.json").read_text())
    theirs = json.loads((runs / "whole" / "run.json").read_text())
    for key in ("status", "model", "settings", "settings_hash", "shard", "inputs"):
        assert ours[key] == theirs[key], key
    for key in ("records", "failures"):
        assert ours["counts"][key] == theirs["counts"][key]
    assert [part["shard"] for part in ours["merged_from"]] == [[k, SHARDS] for k in range(SHARDS)]
    before = files(out)
    predict(model_folder, runs / "list.jsonl", out, "--resume")
    assert files(out) == before


def test_a_folder_of_shards_stands_for_all(runs, tmp_path):
    for k in range(SHARDS):
        shutil.copytree(runs / f"part{k}", tmp_path / "all" / f"shard-{k:05d}-of-{SHARDS:05d}")
    assert merge(tmp_path / "all", "-o", tmp_path / "out") == 3
    assert files(tmp_path / "out") == files(runs / "whole")


def test_a_single_whole_run_is_copied(runs, tmp_path):
    assert merge(runs / "whole", "-o", tmp_path / "out") == 3
    assert files(tmp_path / "out") == files(runs / "whole")


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    for key, value in values.items():
        inner = content
        *way, last = key.split("__")
        for step in way:
            inner = inner[step]
        inner[last] = value
    path.write_text(json.dumps(content))


def refused(capsys, parts, out, words):
    assert merge(*parts, "-o", out) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (out / "predictions.jsonl").exists()


def test_a_missing_shard_is_named(parts, tmp_path, capsys):
    refused(capsys, parts[::2], tmp_path / "out", "shards 1 of 3 are missing")


def test_a_doubled_shard_is_named(parts, tmp_path, capsys):
    refused(capsys, [*parts, parts[1]], tmp_path / "out", "both shard 1 of 3")


def test_an_unfinished_shard_is_named(parts, tmp_path, capsys):
    change(parts[1] / "run.json", status="interrupted")
    refused(capsys, parts, tmp_path / "out", "part1 is not finished: interrupted")


def test_shards_of_other_inputs_are_refused(parts, tmp_path, capsys):
    change(parts[1] / "run.json", inputs__hash="0" * 32)
    refused(capsys, parts, tmp_path / "out", "their inputs differ")


def test_shards_of_other_settings_are_refused(parts, tmp_path, capsys):
    change(parts[2] / "run.json", settings__threshold=0.125)
    lines = (parts[2] / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    header = unseal(lines[0])
    header["identity"]["threshold"] = 0.125
    (parts[2] / "ledger.jsonl").write_bytes(seal(header) + b"".join(lines[1:]))
    refused(capsys, parts, tmp_path / "out", "threshold is")


def test_ledger_and_run_that_do_not_agree_are_refused(parts, tmp_path, capsys):
    change(parts[2] / "run.json", settings__threshold=0.125)
    refused(capsys, parts, tmp_path / "out", "do not belong together")


def test_a_lost_entry_is_named(parts, tmp_path, capsys):
    ledger = parts[1] / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]))
    lost = json.loads(lines[-1])["entry"]
    refused(capsys, parts, tmp_path / "out", f"input {lost} (counted from 0) is in no shard")


def test_an_entry_in_two_shards_is_named(parts, tmp_path, capsys):
    own = (parts[1] / "ledger.jsonl").read_text().splitlines(keepends=True)
    other = (parts[0] / "ledger.jsonl").read_text().splitlines(keepends=True)
    (parts[1] / "ledger.jsonl").write_text(own[0] + other[1] + "".join(own[1:]))
    refused(capsys, parts, tmp_path / "out", "in another shard as well")


@pytest.mark.parametrize("name", ["predictions.jsonl", "failures.jsonl", "mask"])
def test_what_was_changed_since_is_refused(parts, tmp_path, capsys, name):
    if name == "mask":
        path = next(p for p in sorted((parts[0] / "masks").rglob("*.png")) if p.is_file())
    else:
        path = next(p / name for p in parts if (p / name).stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    refused(capsys, parts, tmp_path / "out", "is not what its run wrote")


def test_a_folder_that_holds_no_run(parts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(capsys, [*parts, tmp_path / "empty"], tmp_path / "out", "holds no run")


def test_an_output_with_a_run_needs_overwrite(runs, parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert merge(*parts, "-o", out) == 3
    assert merge(*parts, "-o", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    (out / "predictions.jsonl").write_text("")
    assert merge(*parts, "-o", out, "--overwrite") == 3
    assert files(out) == files(runs / "whole")


def test_the_output_cannot_be_a_shard(parts, capsys):
    before = files(parts[0])
    assert merge(*parts, "-o", parts[0], "--overwrite") == 1
    assert "is one of the shards" in capsys.readouterr().err
    assert files(parts[0]) == before


class Killed(BaseException):
    """Stands for the end of the process: nothing of the project catches it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ends the process at its n-th file that is moved or opened for writing."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    replace, mkdir = os.replace, Path.mkdir

    def counted_replace(source, target, **more):
        count()
        replace(source, target, **more)

    def counted_mkdir(self, *args, **more):
        count()
        mkdir(self, *args, **more)

    # Whoever is dead tidies up nothing.
    monkeypatch.setattr(RunFolder, "close", lambda self: None)
    monkeypatch.setattr(os, "replace", counted_replace)
    monkeypatch.setattr(Path, "mkdir", counted_mkdir)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_wherever_it_is_cut_a_rerun_ends_the_same_and_leaves_nothing(
    runs, parts, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert merge(*parts, "-o", out) == 3
    wanted, names = files(out), everything(out)
    shutil.rmtree(out)
    cuts = 0
    for number in range(200):
        with monkeypatch.context() as patched:
            cut_at(patched, number)
            try:
                main(["merge", *map(str, parts), "-o", str(out)])
                break
            except Killed:
                cuts += 1
        decided = (out / ".risam" / "splice").exists() or (out / "run.json").exists()
        if number % 5 == 0 and not decided:
            RunFolder(out).close()
            assert not out.exists() or everything(out) == set()
        over = ["--overwrite"] if number % 2 else []
        code = merge(*parts, "-o", out, *over)
        said = capsys.readouterr().err
        assert code == 3 or (decided and not over and "holds a run already" in said), said
        assert (files(out), everything(out)) == (wanted, names)
        shutil.rmtree(out)
    assert cuts > 20


def test_a_merge_that_fails_leaves_the_earlier_run(runs, parts, tmp_path):
    out = tmp_path / "out"
    assert merge(*parts, "-o", out) == 3
    before = files(out)
    mask = next(parts[1].rglob("masks/**/*.png"))
    mask.write_bytes(b"other")
    assert merge(*parts, "-o", out, "--overwrite") == 1
    assert files(out) == before
    assert not (out / ".risam" / "incoming").exists()


def test_merging_imports_no_torch(runs, tmp_path, repo):
    import subprocess
    import sys

    args = ["merge", *(str(runs / f"part{k}") for k in range(SHARDS)), "-o", str(tmp_path / "out")]
    code = (
        f"import sys; from risam_cli.cli import main; assert main({args!r}) == 3; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, check=False, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
