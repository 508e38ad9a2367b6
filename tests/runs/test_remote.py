"""Output folders in a store: the bytes of one on a disk, and never half of one that looks whole."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.records import contents

from risam_cli.cli import main
from risam_cli.files import store
from risam_cli.files.remote import StoreError
from risam_cli.runs import remote

URL = "memory://results/run"
Predict = Callable[..., int]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr("risam_cli.files.remote._FIRST_WAIT", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.makedirs("/results", exist_ok=True)
    yield fs
    fs.rm("/results", recursive=True)


@pytest.fixture
def predict(model_folder: Path, tiny_images: Path) -> Predict:
    def call(*args: str | Path, images: str | Path = tiny_images) -> int:
        asked = ["-e", "the red circle", "-e", "star", "--save", "png,html", "--device", "cpu"]
        return main(["predict", str(images), *asked, "--model", str(model_folder), *map(str, args)])

    return call


def there(fs: Any) -> dict[str, bytes]:
    """What the store holds, but for run.json, which holds times."""
    names = fs.find("/results/run")
    found = {name.removeprefix("/results/run/"): fs.cat(name) for name in names}
    found.pop("run.json", None)
    return found


def test_the_output_in_a_store_is_that_of_a_disk(
    memory: Any,
    predict: Predict,
    tiny_images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert predict("-o", tmp_path / "disk") == 0
    assert predict("-o", URL) == 0
    assert there(memory) == contents(tmp_path / "disk")
    assert json.loads(memory.cat("/results/run/run.json"))["status"] == "complete"
    assert not list((tmp_path / "cache").rglob("*.jsonl"))  # no copy is left
    # It is a run: refused, gone on with from any machine, or replaced, as on a disk.
    assert predict("-o", URL) == 1
    assert f"{URL} holds another run" in capfd.readouterr().err
    (tiny_images / "b.jpg").write_bytes((tiny_images / "a.png").read_bytes())
    memory.pipe("/results/run/masks/lost", b"not ours")
    for folder in (URL, tmp_path / "disk"):
        assert predict("-o", folder, "--resume") == 0
    assert memory.cat("/results/run/masks/lost") == b"not ours"
    memory.rm("/results/run/masks/lost")
    assert there(memory) == contents(tmp_path / "disk")
    for folder in (URL, tmp_path / "disk"):
        assert predict("-o", folder, "--overwrite", images=tiny_images / "sub") == 0
    assert there(memory) == contents(tmp_path / "disk")
    assert predict("-o", URL, "--dry-run") == 0
    assert "(holds a run already)" in capfd.readouterr().out


def test_an_upload_that_breaks_off_counts_for_nothing_and_goes_on(
    memory: Any,
    predict: Predict,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert predict("-o", tmp_path / "disk") == 0
    put, sent = store.put_file, list[str]()

    def until_it_breaks(path: Path, url: str) -> None:
        if len(sent) == 5:
            raise StoreError(f"{url}: the store refuses access (no)", "check your permissions")
        put(path, url)
        sent.append(url)

    monkeypatch.setattr(remote, "_AT_ONCE", 1)
    monkeypatch.setattr(remote, "put_file", until_it_breaks)
    capfd.readouterr()
    assert predict("-o", URL, "-q") == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "the store refuses access" in said[0]
    assert "the results are kept in" in said[0]
    assert "go on with --resume" in said[0]
    assert not memory.exists("/results/run/ledger.jsonl")
    first = set(sent)
    sent.clear()
    monkeypatch.setattr(remote, "put_file", lambda path, url: (put(path, url), sent.append(url)))
    assert predict("-o", URL, "--resume") == 0
    assert not first & set(sent)
    assert sent[-1].endswith("ledger.jsonl")
    assert there(memory) == contents(tmp_path / "disk")


def test_processes_of_torchrun_upload_once(
    memory: Any, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict("-o", tmp_path / "disk") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        assert not memory.exists("/results/run/ledger.jsonl")
        monkeypatch.setenv("RANK", rank)
        assert predict("-o", URL) == 0
    assert there(memory) == contents(tmp_path / "disk")


def test_a_tar_gives_what_its_images_give(
    predict: Predict, tiny_images: Path, tmp_path: Path
) -> None:
    tar = tmp_path / "set.tar"
    with tarfile.open(tar, "w") as packed:
        for path in sorted(tiny_images.rglob("*.*")):
            packed.add(path, path.relative_to(tiny_images).as_posix())
    named = [tar, tiny_images]
    for images, folder in zip(named, ("tar", "disk"), strict=True):
        cut = ["--limit", "2", "-o", tmp_path / folder]
        assert predict(*cut, images=images) == 0
        assert predict("-o", tmp_path / folder, "--resume", images=images) == 0
    rows = [
        {json.loads(line)["image"].removeprefix(f"{images}/"): [] for line in records.open()}
        for images, records in zip(
            named, (tmp_path / f / "predictions.jsonl" for f in ("tar", "disk")), strict=True
        )
    ]
    for found, images, folder in zip(rows, named, ("tar", "disk"), strict=True):
        for line in (tmp_path / folder / "predictions.jsonl").open():
            row = json.loads(line)
            said = [row[key] for key in ("expression", "segmentation", "score", "no_target")]
            found[row["image"].removeprefix(f"{images}/")].append(said)
    assert len(rows[0]) == 6
    assert rows[0] == rows[1]


def test_other_commands_say_that_they_write_to_disks(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", ".", "-o", URL]) == 2
    assert "a folder on a disk is needed here" in capfd.readouterr().err
