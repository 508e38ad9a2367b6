"""Entries on disk: whole or not at all, told from damage, within a limit, shared by processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.feature_entries import KEYS, entry, open_store
from support.paths import TESTS

from risam_cli.errors import OutputError
from risam_cli.files.sizes import parse_size, show_size
from risam_cli.inference import feature_store


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def used(folder: Path) -> int:
    return int((folder / "used").read_text())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_what_is_written_is_read_also_by_safetensors(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.read(KEYS[0]) is None
    store.write(KEYS[0], entry(1))
    found = open_store(tmp_path).read(KEYS[0])
    assert found is not None
    assert found.arrays["deep"].data.tobytes() == entry(1).arrays["deep"].data.tobytes()
    assert found.arrays["deep"].shape == (5, 100)
    assert found.notes["deep"] == "float32"
    tensor = load_file(files(tmp_path)[0])["deep"]
    assert tensor.dtype == torch.float16
    assert tensor.view(torch.uint8).numpy().tobytes() == entry(1).arrays["deep"].data.tobytes()


def test_other_encoders_have_other_entries(tmp_path: Path) -> None:
    open_store(tmp_path, "a").write(KEYS[0], entry())
    other = open_store(tmp_path, "b")
    assert other.read(KEYS[0]) is None
    assert other.held == 0
    assert other.used == size_of(tmp_path) > 0
    assert open_store(tmp_path, "a").held == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    store = open_store(tmp_path_factory.mktemp("store"))
    store.write(KEYS[0], entry())
    return files(store.folder)[0].read_bytes()


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_any_damage_is_seen_told_and_taken_away(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, at: float, flip: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    store = open_store(folder)
    store.write(KEYS[0], entry())
    path = files(folder)[0]
    place = int(at * len(whole))
    changed = bytearray(whole)
    changed[place] ^= flip
    path.write_bytes(whole[:place] if cut else bytes(changed))
    assert store.read(KEYS[0]) is None
    assert store.counts.damaged == 1
    assert not path.exists()
    store.write(KEYS[0], entry())
    assert store.read(KEYS[0]) is not None
    shutil.rmtree(folder)


def test_an_entry_under_another_name_is_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)
    store.write(KEYS[0], entry())
    other = store.own / KEYS[1][:2] / f"{KEYS[1]}.safetensors"
    other.parent.mkdir(exist_ok=True)
    shutil.copy(files(tmp_path)[0], other)
    assert store.read(KEYS[1]) is None
    assert "belongs to another picture or encoder" in capsys.readouterr().err
    assert store.read(KEYS[0]) is not None


def test_an_entry_of_another_encoder_put_here_by_hand_is_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path, "a")
    store.write(KEYS[0], entry())
    other = open_store(tmp_path, "b")
    shutil.copytree(store.own / KEYS[0][:2], other.own / KEYS[0][:2])
    assert other.read(KEYS[0]) is None
    assert (other.counts.damaged, other.held) == (1, 0)
    assert store.read(KEYS[0]) is not None


def test_a_limit_makes_others_go_first_and_never_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("oldest", "older")):
        store = open_store(tmp_path, name)
        for key in KEYS[:3]:
            store.write(key, entry())
        os.utime(store.own / "about.json", (1000 + number, 1000 + number))
    each = files(tmp_path)[0].stat().st_size
    oldest, older = open_store(tmp_path / "elsewhere", "oldest").own.name, store.own.name
    shutil.rmtree(tmp_path / "elsewhere")
    limit = 8 * each + each // 2
    own = open_store(tmp_path, "own", limit)
    kept = []
    for count, key in enumerate(KEYS[:12]):
        own.write(key, entry(count))
        assert size_of(tmp_path) == used(tmp_path) <= limit
        kept.append([len(files(tmp_path / name)) for name in (oldest, older, own.own.name)])
    assert kept[1] == [3, 3, 2]
    assert kept[2] == [2, 3, 3]
    assert kept[5] == [0, 2, 6]
    assert kept[7:] == [[0, 0, 8]] * 5
    assert not own.adds
    assert capsys.readouterr().err.count("limit of") == 1
    assert all(own.read(key) is not None for key in KEYS[:8])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_ends_the_adding_not_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    store = open_store(tmp_path)
    store.write(KEYS[0], entry())

    def refuse(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.os, "replace", refuse)
        store.write(KEYS[1], entry())
        store.write(KEYS[2], entry())
    assert capsys.readouterr().err.count("computed each time") == 1
    assert list(tmp_path.rglob("*.part")) == []
    assert used(tmp_path) == size_of(tmp_path)
    assert store.read(KEYS[0]) is not None


def test_the_last_of_the_disk_is_left_to_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=(1 << 30) + 100)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda path: free)
    store = open_store(tmp_path)
    store.write(KEYS[0], entry())
    assert files(tmp_path) == []
    assert used(tmp_path) == 0
    assert "are free" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_store(tmp_path).write(KEYS[0], entry())

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(feature_store, "create", refuse)
    store = open_store(tmp_path)
    assert store.read(KEYS[0]) is not None
    store.write(KEYS[1], entry())
    assert len(files(tmp_path)) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match=r"feature cache .*: File exists; choose another"):
        open_store(tmp_path / "cache")


def test_what_others_keep_in_the_folder_stays(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "ab" / "mine.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x" * 5000)
    (tmp_path / "theirs" / "about.json").write_text(json.dumps({"about": "something else"}))
    store = open_store(tmp_path, limit=3000)
    assert store.used == 0
    for key in KEYS[:5]:
        store.write(key, entry())
    assert theirs.exists()
    assert not store.adds


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(KEYS[0], entry())
    shard = files(tmp_path)[0].parent
    (shard / ".dead.part").write_bytes(b"x")
    os.utime(shard / ".dead.part", (1000, 1000))
    (shard / ".alive.part").write_bytes(b"x")
    (tmp_path / "used").write_text("torn")
    again = open_store(tmp_path)
    assert [path.name for path in shard.glob(".*")] == [".alive.part"]
    assert used(tmp_path) == size_of(tmp_path) == again.used


WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.feature_entries import KEYS, entry, open_store
import random
store = open_store(Path(sys.argv[1]), limit=int(sys.argv[4]))
order = list(range(len(KEYS)))
random.Random(int(sys.argv[3])).shuffle(order)
for number in order:
    store.write(KEYS[number], entry(number))
    found = store.read(KEYS[number])
    assert found is None or (found.arrays["deep"].data == entry(number).arrays["deep"].data).all()
assert store.counts.damaged == 0
"""


def test_who_opens_the_folder_meanwhile_leaves_an_entry_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, replace = open_store(tmp_path), os.replace
    told: list[int] = []

    def meanwhile(part: Path, path: Path) -> None:
        if path.name.endswith(".safetensors"):
            monkeypatch.setattr(os, "replace", replace)
            told.append(open_store(tmp_path).used)
        replace(part, path)

    monkeypatch.setattr(os, "replace", meanwhile)
    store.write(KEYS[0], entry())
    assert told == [size_of(tmp_path)]
    assert used(tmp_path) == size_of(tmp_path)


@pytest.mark.parametrize("room", [100, 20])
def test_processes_share_a_folder(tmp_path: Path, room: int) -> None:
    each = len(entry().arrays["deep"].data) + 200
    here = str(TESTS)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path), here, str(seed), str(room * each)]
        )
        for seed in range(3)
    ]
    assert [process.wait(600) for process in running] == [0, 0, 0]
    assert list(tmp_path.rglob("*.part")) == []
    assert size_of(tmp_path) <= room * each
    whole = open_store(tmp_path)
    numbers = [number for number, key in enumerate(KEYS) if whole.read(key) is not None]
    assert len(numbers) == len(files(tmp_path))
    assert len(numbers) == len(KEYS) if room == 100 else len(numbers) >= 10
    assert whole.counts.damaged == 0


@given(st.integers(1, 10**15))
def test_sizes_as_shown_are_the_sizes(size: int) -> None:
    assert parse_size(show_size(size)) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50 << 30), ("1.5 tb", 3 << 39), ("4096", 4096), ("7 KiB", 7168), ("2m", 2 << 20)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1B", "1e9", "50 apples", "nan", "1PB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("name", ["used", "lock", "writing", "own", "about.json"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(
    tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    theirs, folder, away = tmp_path / "theirs", tmp_path / "cache", tmp_path / "away"
    theirs.write_text("theirs")
    away.mkdir()
    own = open_store(folder).own
    if name == "own":
        shutil.rmtree(own)
        own.symlink_to(away)
    else:
        place = (own if name == "about.json" else folder) / name
        place.unlink()
        link(theirs, place)
    if name == "own" or link is os.symlink:
        with pytest.raises(OutputError, match="is a link to"):
            open_store(folder)
    else:
        open_store(folder).write(KEYS[0], entry())
        assert len(files(folder)) == 1
    assert theirs.read_text() == "theirs"
    assert list(away.iterdir()) == []


def test_a_link_that_comes_while_a_cache_is_open_leads_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"
    away.mkdir()
    store = open_store(tmp_path / "cache")
    (store.own / KEYS[0][:2]).symlink_to(away)
    store.write(KEYS[0], entry())
    assert list(away.iterdir()) == []
    assert not store.adds
    assert f"leads to {away}" in capsys.readouterr().err
