"""Files in stores and tars: read as those on a disk, whatever the store does meanwhile."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.stores import BUCKET, KEYS, FaultyS3, s3_server

from risam_cli.cli import main
from risam_cli.data.images.files import file_sha256, file_stamp
from risam_cli.data.images.images import image_size, open_rgb
from risam_cli.data.inputs import tars
from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.errors import DataError, ImageError, MachineError, UsageError
from risam_cli.files import store
from risam_cli.files.remote import StoreError
from risam_cli.files.store import RemotePath, TarPath, join, place

MEMORY = "memory://set"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("risam_cli.files.remote._FIRST_WAIT", 0.001)


@pytest.fixture
def memory(tiny_images: Path) -> Iterator[Any]:
    """The tiny images in fsspec's memory, with lists of them."""
    fs = fsspec.filesystem("memory")
    fs.put(str(tiny_images), "/set/images", recursive=True)
    lines = [{"image": "images/a.png", "expression": "x"}, {"image": "images/sub/e.bmp"}]
    fs.pipe("/set/m.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    fs.pipe("/set/m.csv", b"image,expression\nimages/b.jpg,the star\n")
    coco = {
        "images": [{"id": 1, "file_name": "images/d.webp", "height": 50, "width": 20}],
        "annotations": [],
        "expressions": [{"id": 77, "image_id": 1, "text": "the dog", "ann_ids": []}],
    }
    fs.pipe("/set/m.json", json.dumps(coco).encode())
    yield fs
    fs.rm("/set", recursive=True)


def entries(*arguments: str | Path, **options: Any) -> list[Entry]:
    inputs = Inputs([str(one) for one in arguments], ["it"], **options)
    inputs.check()
    return list(inputs)


def asked(found: list[Entry]) -> list[tuple[str, str]]:
    return [(x.id, x.text) for one in found if one.sample for x in one.sample.expressions]


# --- places ---------------------------------------------------------------------------------------


def test_a_place_in_a_store_is_a_path_that_keeps_its_address() -> None:
    path = RemotePath("s3://bucket/a//b c.png")
    assert str(path) == f"{path}" == "s3://bucket/a//b c.png"
    assert isinstance(path, Path)
    assert pickle.loads(pickle.dumps(path)) == path
    assert path != RemotePath("s3://bucket/a/b c.png")
    assert (path.name, path.suffix, str(path.parent)) == ("b c.png", ".png", "s3://bucket/a/")
    assert str(RemotePath("s3://bucket").parent) == "s3://bucket"
    assert str(path.parent / "d.png") == "s3://bucket/a/d.png"
    assert str(path / "d.png") == "s3://bucket/a//b c.png/d.png"
    member = TarPath(RemotePath("s3://b/t.tar"), "x/1.png", 512, 72)
    assert str(member) == "s3://b/t.tar/x/1.png"
    assert pickle.loads(pickle.dumps(member)) == member
    assert place("file:///a/b.png") == Path("/a/b.png")
    base = RemotePath("s3://bucket/lists")
    assert str(join(base, "../images/a.png")) == "s3://bucket/images/a.png"
    assert str(join(base, "../../../a.png")) == "s3://bucket/a.png"
    assert str(join(Path("x"), "gs://b/a.png")) == "gs://b/a.png"
    assert join(Path("x"), "a.png") == Path("x/a.png")


def test_braces_stand_for_lists_and_ranges() -> None:
    assert store.expand_braces("a{08..10}.{x,y}") == [
        f"a{number}.{end}" for number in ("08", "09", "10") for end in "xy"
    ]


# --- inputs ---------------------------------------------------------------------------------------


def test_a_store_is_walked_as_a_disk_is(memory: Any, tiny_images: Path) -> None:
    (tiny_images / "out").mkdir()
    memory.pipe("/set/images/.hidden.png", b"x")
    memory.pipe("/set/images/out/ledger.jsonl", b"x")
    memory.pipe("/set/images/out/mask.png", b"x")
    memory.pipe("/set/images/notes.txt", b"x")
    inputs = Inputs([f"{MEMORY}/images"], ["it"])
    inputs.check()
    found = [one.image.removeprefix(f"{MEMORY}/images/") for one in inputs]
    assert found == [one.image.removeprefix(f"{tiny_images}/") for one in entries(tiny_images)]
    assert dict(inputs.skipped) == {
        "hidden files and folders": 1,
        "output folders": 1,
        ".txt files": 1,
    }
    assert len(entries(f"{MEMORY}/images/*.png")) == 2


def test_file_urls_are_the_disk(tiny_images: Path, tmp_path: Path) -> None:
    found = entries(f"file://{tiny_images}", f"file://{tiny_images}/*.png")
    assert [one.key for one in found] == [
        one.key for one in entries(tiny_images, tiny_images / "*.png")
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": f"file://{tiny_images}/a.png"}))
    (named,) = entries(f"file://{tmp_path}/m.jsonl")
    assert named.sample is not None
    assert open_rgb(named.sample.path).shape == (30, 40, 3)


def test_lists_in_a_store_name_images_beside_them_or_anywhere(
    memory: Any, tiny_images: Path, tmp_path: Path
) -> None:
    assert asked(entries(f"{MEMORY}/m.jsonl", f"{MEMORY}/m.csv", f"{MEMORY}/m.json")) == [
        *(("images/a.png#0", "x"), ("images/sub/e.bmp#0", "it")),
        *(("images/b.jpg#0", "the star"), ("77", "the dog")),
    ]
    local = tmp_path / "l.jsonl"
    names = [f"{MEMORY}/images/c.png", str(tiny_images / "a.png")]
    local.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    found = entries(local)
    assert [str(one.sample.path) for one in found if one.sample] == names
    for path, name in ((one.sample.path, one.image) for one in found if one.sample):
        assert open_rgb(path).shape[2] == 3
        assert file_sha256(path) == file_sha256(tiny_images / Path(name).name)
        assert file_stamp(path) == file_stamp(path) is not None
    rooted = entries(f"{MEMORY}/m.csv", image_root=RemotePath(f"{MEMORY}/images/.."))
    assert str(rooted[0].sample and rooted[0].sample.path).endswith("images/b.jpg")
    memory.pipe("/set/out.jsonl", b'{"image": "memory://other/a.png"}\n{"image": "/etc/a.png"}\n')
    for one in entries(f"{MEMORY}/out.jsonl", confine=True):
        assert "to which files are confined" in one.failures[0].message


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_a_size_is_read_from_the_head_where_that_suffices(
    kind: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    data = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(data, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind), exif=turned)
    assert len(data.getvalue()) > 1 << 16
    memory.pipe(f"/set/big.{kind}", data.getvalue())
    read, cat = [], type(memory).cat_file

    def counted(self: Any, *args: Any, **options: Any) -> bytes:
        read.append(cat(self, *args, **options))
        return bytes(read[-1])

    monkeypatch.setattr(type(memory), "cat_file", counted)
    path = RemotePath(f"{MEMORY}/big.{kind}")
    assert image_size(path) == open_rgb(path).shape[:2]
    if kind in ("jpg", "bmp", "gif"):  # others are looked at as a whole
        assert [len(one) for one in read] == [1 << 16, len(data.getvalue())]


def test_a_changed_object_has_another_stamp(memory: Any, tiny_images: Path) -> None:
    path = RemotePath(f"{MEMORY}/images/a.png")
    before = file_stamp(path)
    memory.pipe("/set/images/a.png", (tiny_images / "c.png").read_bytes())
    assert file_stamp(path) != before
    assert file_stamp(RemotePath(f"{MEMORY}/none.png")) is None


# --- tars -----------------------------------------------------------------------------------------


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def members(images: Path) -> list[tuple[str, bytes]]:
    png = (images / "a.png").read_bytes()
    return [
        ("x/1.png", png),
        ("x/1.json", b'{"expressions": ["p", "q"], "id": 7}'),
        ("x/2.v1.txt", b"not an ending of this sample"),
        ("x/2.jpg", (images / "b.jpg").read_bytes()),
        ("x/2.txt", b"the star\n\nthe ring\n"),
        ("x/3.png", png),
        ("x/4.txt", b"no image"),
    ]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_tars_are_read_as_webdataset_groups_them(
    where: str, memory: Any, tiny_images: Path, tmp_path: Path
) -> None:
    whole = tar_of(members(tiny_images))
    (tmp_path / "t.tar").write_bytes(whole)
    memory.pipe("/set/t.tar", whole)
    tar = str(tmp_path / "t.tar") if where == "disk" else f"{MEMORY}/t.tar"
    found = entries(tar)
    assert asked(found) == [
        *(("7#0", "p"), ("7#1", "q"), (f"{tar}/x/2.jpg#0", "the star")),
        *((f"{tar}/x/2.jpg#1", "the ring"), (f"{tar}/x/3.png#0", "it")),
    ]
    assert "x/4: holds 0 images" in found[3].failures[0].message
    for one, name in zip(found, ("a.png", "b.jpg", "a.png"), strict=False):
        assert one.sample is not None
        assert (open_rgb(one.sample.path) == open_rgb(tiny_images / name)).all()
    webdataset = pytest.importorskip("webdataset")
    samples = webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False)
    grouped = {one["__key__"] for one in samples}
    assert {f"x/{k}" for k in (1, 2, 3, 4)} <= grouped


def test_a_tar_in_a_store_is_gone_through_once(
    memory: Any, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/set/t.tar", tar_of(members(tiny_images)))
    opened, open_place = list[Path](), tars.open_place

    def counted(path: Path) -> Any:
        opened.append(path)
        return open_place(path)

    monkeypatch.setattr(tars, "open_place", counted)
    inputs = Inputs([f"{MEMORY}/t.tar"], ["it"])
    first, second = list(inputs), list(inputs)
    assert [one.key for one in first] == [one.key for one in second]
    assert len(opened) == 1
    monkeypatch.setattr(tars, "MOST_KEPT", 1)  # too many to be kept
    inputs = Inputs([f"{MEMORY}/t.tar"], ["it"])
    assert [one.key for one in list(inputs)] == [one.key for one in list(inputs)]
    assert len(opened) == 3


def test_a_tar_that_is_cut_gives_what_is_whole_and_one_line(
    memory: Any, tiny_images: Path, tmp_path: Path
) -> None:
    whole = tar_of(members(tiny_images))
    second = whole.index(b"x/2.jpg")
    for cut in (second + 700, second + 100):
        (tmp_path / "t.tar").write_bytes(whole[:cut])
        memory.pipe("/set/t.tar", whole[:cut])
        for tar in (str(tmp_path / "t.tar"), f"{MEMORY}/t.tar"):
            found = entries(tar)
            assert asked(found) == [("7#0", "p"), ("7#1", "q")]
            assert (
                f"{tar}: the tar is truncated or damaged in or after"
                in found[-1].failures[0].message
            )
    (tmp_path / "t.tar").write_bytes(b"no tar at all" * 100)
    assert "at its beginning" in entries(tmp_path / "t.tar")[0].failures[0].message
    with pytest.raises(DataError, match=r"compressed tar .* decompress it"):
        list(tars.read_tar(tmp_path / "t.tar.gz"))


# --- faults ---------------------------------------------------------------------------------------


class _Web(BaseHTTPRequestHandler):
    """Answers by the last part of the path: an image, or a fault."""

    data = b""
    tries: dict[str, int]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        what = self.path.rpartition("/")[2]
        number = self.tries[what] = self.tries.get(what, 0) + 1
        code = {"403.png": 403, "404.png": 404, "500.png": 500}.get(what, 200)
        code = 503 if what == "busy.png" and number < 4 else code
        self.send_response(code)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        if code == 200 and self.command == "GET":
            self.wfile.write(self.data[: len(self.data) // (2 if number < 4 else 1)])
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(tiny_images: Path) -> Iterator[Callable[[str], RemotePath]]:
    pytest.importorskip("aiohttp")
    handler = type("Web", (_Web,), {"tries": {}, "data": (tiny_images / "a.png").read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield lambda name: RemotePath(f"http://127.0.0.1:{server.server_port}/{name}")
    server.shutdown()
    server.server_close()


def test_what_passes_is_tried_again_and_what_does_not_is_one_line(
    web: Callable[[str], RemotePath], tiny_images: Path
) -> None:
    for name in ("busy.png", "cut.png"):
        assert (open_rgb(web(name)) == open_rgb(tiny_images / "a.png")).all()
    for name, said in (
        ("404.png", "no such object"),
        ("403.png", "the store refuses access"),
        ("500.png", "did not answer in 5 tries"),
    ):
        with pytest.raises(ImageError, match=said) as raised:
            open_rgb(web(name))
        assert str(raised.value).startswith(str(web(name)))
        assert "\n" not in str(raised.value)


def test_a_store_that_is_read_only_is_told_of(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.find("/set")
    store.require_writable(f"{MEMORY}/new")
    assert memory.find("/set") == before

    def absent(*args: Any, **options: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(memory), "pipe_file", absent)
    with pytest.raises(StoreError, match="memory:// cannot be written to"):
        store.require_writable(f"{MEMORY}/new")


def test_what_no_image_can_mend_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown storage type bogus://"):
        entries("bogus://a/b.png")

    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(UsageError, match=r"s3:// needs a package .* pip install 'risam\[remote\]'"):
        entries("s3://a/b.png")
    with pytest.raises(MachineError, match=r"risam\[remote\]"):
        open_rgb(RemotePath("s3://a/b.png"))


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: FaultyS3, tiny_images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket with the tiny images, for this process's own S3."""
    s3.faults.clear()
    s3.seen.clear()
    for key, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2, "retries": {}}}
    )
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    fs.put(str(tiny_images), f"{BUCKET}/images", recursive=True)
    yield fs
    fs.rm(f"{BUCKET}/images", recursive=True)


FAULTS = {
    f"GET /{BUCKET}/images/m.jsonl": ("503", "cut"),
    f"GET /{BUCKET}/images/a.png": ("503", "503"),
    f"GET /{BUCKET}/images/b.jpg": ("cut", "503", "cut"),
    f"GET /{BUCKET}/images/c.png": ("stall",),
    f"GET /{BUCKET}/images/sub/e.bmp": ("gone",),
    f"PUT /{BUCKET}/out/predictions.jsonl": ("503", "cut"),
    f"PUT /{BUCKET}/out/ledger.jsonl": ("stall",),
}


def test_a_run_from_and_to_a_store_that_fails_is_that_on_a_disk(
    s3: FaultyS3,
    bucket: Any,
    tiny_images: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"image": name, "expressions": ["the star", "ring"]}
        for name in ("a.png", "b.jpg", "c.png", "d.webp", "sub/e.bmp", "none.png")
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tiny_images / "m.jsonl").write_text(lines)
    bucket.pipe(f"{BUCKET}/images/m.jsonl", lines.encode())
    s3.faults.update({request: list(faults) for request, faults in FAULTS.items()})
    local, remote = tmp_path / "local", f"s3://{BUCKET}/out"
    model = ["--model", str(model_folder), "--device", "cpu", "--image-timeout", "20"]
    here = ["predict", str(tiny_images / "m.jsonl"), *model, "-o", str(local)]
    there = ["predict", f"s3://{BUCKET}/images/m.jsonl", *model, "-o", remote]

    def same() -> bool:
        bucket.invalidate_cache()
        masks = sorted(local.glob("masks/**/*.png"))
        names = [path.relative_to(local).as_posix() for path in masks]
        listed = sorted(
            name.removeprefix(f"{BUCKET}/out/") for name in bucket.find(f"{BUCKET}/out")
        )
        assert [name for name in listed if name.endswith(".png")] == names
        assert "ledger.jsonl" in listed
        return all(
            bucket.cat(f"{BUCKET}/out/{name}") == (local / name).read_bytes()
            for name in ("predictions.jsonl", *names)
        )

    (tiny_images / "sub" / "e.bmp").rename(tmp_path / "e.bmp")
    assert (main(here), main(there)) == (3, 3)
    assert s3.seen == {"503": 5, "cut": 4, "stall": 2, "gone": 1}
    assert same()
    failures = bucket.cat(f"{BUCKET}/out/failures.jsonl").splitlines()
    ids = [json.loads(line)["id"] for line in (local / "failures.jsonl").open()]
    assert [json.loads(line)["id"] for line in failures] == ids
    assert all(b"no such object" in line for line in failures)
    # What vanished is there again: it is tried once more, and the rest is left alone.
    (tmp_path / "e.bmp").rename(tiny_images / "sub" / "e.bmp")
    assert (main([*here, "--retry-failed"]), main([*there, "--retry-failed"])) == (3, 3)
    assert same()
    # An object that changed is done again; the store refuses it at first.
    Image.fromarray(np.full((9, 9, 3), 128, np.uint8)).save(tiny_images / "a.png")
    bucket.put(str(tiny_images / "a.png"), f"{BUCKET}/images/a.png")
    assert main([*here, "--resume"]) == 3
    s3.faults[f"PUT /{BUCKET}/out/predictions.jsonl"] = ["refused"]
    capfd.readouterr()
    assert main([*there, "--resume", "-q"]) == 1
    assert "the store refuses access" in capfd.readouterr().err.splitlines()[-1]
    bucket.invalidate_cache()
    assert not bucket.exists(f"{BUCKET}/out/ledger.jsonl")
    assert main([*there, "--resume"]) == 3
    assert same()


def test_s3_refusals_are_one_line(
    s3: FaultyS3,
    bucket: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(StoreError, match="no such bucket"):
        entries("s3://nowhere/a.png")
    with pytest.raises(StoreError, match="no such object"):
        entries(f"s3://{BUCKET}/none.jsonl")
    words = ["predict", f"s3://{BUCKET}/images/a.png", "-e", "x", "-o"]
    for output, said in (
        ("s3://nowhere/out", "no such bucket"),
        ("http://127.0.0.1:1/out", "the store did not answer in 5 tries"),
    ):  # before any work is done
        assert main([*words, output]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for key in KEYS:
        monkeypatch.delenv(key)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreError, match="the credentials for s3:// are missing or refused"):
        entries(f"s3://{BUCKET}/images/a.png")
    with pytest.raises(MachineError, match="credentials"):
        open_rgb(RemotePath(f"s3://{BUCKET}/images/a.png"))
    (tmp_path / "m.jsonl").write_text(f'{{"image": "s3://{BUCKET}/images/a.png"}}\n' * 3)
    capfd.readouterr()
    assert main(["predict", str(tmp_path / "m.jsonl"), *words[2:], str(tmp_path / "o"), "-q"]) == 1
    (line,) = capfd.readouterr().err.splitlines()  # and not one for each image
    assert "missing or refused" in line
    assert "AWS_PROFILE), then continue with --resume" in line
    fsspec.get_filesystem_class("s3").clear_instance_cache()
