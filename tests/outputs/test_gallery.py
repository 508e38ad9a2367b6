"""The gallery of a run: its bytes, its safety, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, find_browser
from support.predict_fakes import FakeModel
from support.predict_runs import Killed, Run, contents, draw_pictures, kill_at

from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import OutputError
from risam_cli.files.write import write_file
from risam_cli.outputs.gallery import SIDE, Gallery, Row, encode_item, outline, small_size
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.gallery import write_gallery
from risam_cli.runs.merge import find_parts, merge_parts
from risam_cli.runs.shard import Shard
from risam_cli.runs.writer import Saving

HTML = Saving(png=True, overlay=False, max_pixels=MAX_PIXELS, html=True)
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'x' \u2028 <!--"
)


def into(folder: Path) -> Callable[[str, str], None]:
    return lambda name, text: write_file(folder / name, text)


def no_writing(name: str, text: str) -> None:
    raise AssertionError(name)


def value_of(script: Path) -> Any:
    """What a file of data or an item hands to the page."""
    found = re.fullmatch(r"risam\.(?:data\(\d+,|item\()(.*)\);\n", script.read_text("ascii"), re.S)
    assert found is not None
    return json.loads(found[1])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "gallery/data").glob("*.js"))
    return [row for file in files for row in value_of(file)]


def head_of(folder: Path) -> dict[str, Any]:
    page = (folder / "gallery/index.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="head">(.*?)</script>', page, re.S)
    assert found is not None
    head: dict[str, Any] = json.loads(found[1])
    return head


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def test_every_record_and_failure_is_on_the_page(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert Run([pictures], out, saving=HTML).go() == 3
    records = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    failures = [json.loads(line) for line in (out / "failures.jsonl").open()]
    rows = rows_of(out)
    assert [answer[0] for row in rows for answer in row.get("e", ())] == [r["id"] for r in records]
    told = [(one[0], one[2]) for row in rows for one in row.get("f", ())]
    assert told == [(one["id"], one["message"]) for one in failures]
    counts = head_of(out)["counts"]
    assert (counts["images"], counts["failures"]) == (8, len(failures))
    assert counts["masks"] + counts["no_target"] == len(records)
    for row in rows:
        assert ("k" in row) == ("e" in row)
        if "k" in row:
            item = value_of(out / "gallery" / row["k"])
            assert len(item["paths"]) == len(row["e"])
            assert (item["w"], item["h"]) == tuple(row["s"])  # small images keep their size
            for path, answer in zip(item["paths"], row["e"], strict=True):
                assert bool(path) == (answer[3] == 0)


def test_the_page_names_the_model_and_the_words_that_it_does_not_know(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run([pictures], tmp_path / "known", saving=HTML)
    run.go()
    head = head_of(tmp_path / "known")
    assert head["model"] == run.model.name != ""
    assert head["warning"] == ""
    asked = ("bright", "an unheard-of one")
    capsys.readouterr()
    Run([pictures], tmp_path / "whole", e=asked, saving=HTML).go()
    [told] = [line for line in capsys.readouterr().err.splitlines() if "expressions have" in line]
    head = head_of(tmp_path / "whole")
    assert head["warning"] == f"{told.removeprefix('warning: ')}: 'unheard-of'"
    assert "their masks mean little" in head["warning"]
    answers = [answer for row in rows_of(tmp_path / "whole") for answer in row.get("e", ())]
    marked = {answer[1] for answer in answers if answer[5:] == [["unknown words: unheard-of"]]}
    assert marked == {"an unheard-of one"}
    folders = [tmp_path / f"part{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        Run([pictures], folder, e=asked, saving=HTML, plan={"shard": Shard(index, 2)}).go()
    merge_parts(find_parts(folders), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_a_run_that_was_cut_off_gives_the_same_gallery(pictures: Path, tmp_path: Path) -> None:
    Run([pictures], tmp_path / "whole", saving=HTML).go()
    cut = Run([pictures], tmp_path / "cut", saving=HTML)
    kill_at(cut.model, 3)
    with pytest.raises(Killed):
        cut.go()
    assert not (tmp_path / "cut/gallery/index.html").exists()
    Run([pictures], tmp_path / "cut", saving=HTML).go()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_shards_merge_to_the_same_gallery(pictures: Path, tmp_path: Path) -> None:
    Run([pictures], tmp_path / "whole", saving=HTML).go()
    folders = [tmp_path / f"part{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        Run([pictures], folder, saving=HTML, plan={"shard": Shard(index, 3)}).go()
        assert head_of(folder)["counts"]["images"] < 8
    merge_parts(find_parts(folders), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_overwrite_takes_the_gallery_away_and_nothing_else(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run([pictures], out, saving=HTML).go()
    own = out / "gallery/data/notes.js"
    own.write_text("mine")
    Run([pictures], out, overwrite=True).go()
    left = sorted(str(path.relative_to(out)) for path in (out / "gallery").rglob("*"))
    assert left == ["gallery/data", "gallery/data/notes.js"]


def test_a_folder_without_a_gallery_gets_none(pictures: Path, tmp_path: Path) -> None:
    Run([pictures], tmp_path / "out").go()
    assert write_gallery(tmp_path / "out", no_writing) is None
    assert not (tmp_path / "out/gallery").exists()


def test_a_planted_link_is_not_followed(pictures: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    Run([pictures], out, saving=HTML).go()
    shutil.rmtree(out / "gallery/data")
    (out / "gallery/data").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="outside of"):
        write_gallery(out, no_writing)
    with RunFolder(out) as folder, pytest.raises(OutputError, match="outside of"):
        folder.start_anew()
    assert list(elsewhere.iterdir()) == []


def test_what_comes_from_outside_stays_text(tmp_path: Path) -> None:
    record = a_record(0, expression=HOSTILE, image=HOSTILE)
    failure = {"id": "x", "expression": HOSTILE, "message": HOSTILE}
    gallery = Gallery(tmp_path, {"model": HOSTILE}, into(tmp_path))
    gallery.add(Row(HOSTILE, [record], [failure], "gallery/items/a b#?.js"))
    page = gallery.finish().read_text("utf-8")
    data = (tmp_path / "gallery/data/00000.js").read_text("ascii")
    assert "<" not in data
    assert page.count("</script>") == 2
    assert "alert(1)</script" not in page
    assert value_of(tmp_path / "gallery/data/00000.js")[0]["e"][0][1] == HOSTILE


def test_data_files_of_a_longer_run_before_are_removed(tmp_path: Path) -> None:
    write_page(tmp_path, 600)
    assert len(list((tmp_path / "gallery/data").iterdir())) == 3
    write_page(tmp_path, 10)
    assert [path.name for path in (tmp_path / "gallery/data").iterdir()] == ["00000.js"]


@pytest.mark.parametrize("size", [(30, 40), (800, 1200), (1, 900), (900, 1)])
def test_an_outline_covers_its_mask(size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.bool_)
    mask[size[0] // 3 : size[0] // 3 + max(1, size[0] // 2), : max(1, size[1] // 2)] = True
    mask[size[0] // 2, size[1] // 4] = size[0] < 10  # a hole
    height, width = small_size(*size)
    assert max(height, width) <= SIDE
    drawn = np.zeros((height, width), np.uint8)
    rings = [
        np.array([[int(v) for v in point.split(",")] for point in ring.split()])
        for ring in re.findall(r"M([^Z]*)Z", outline(mask))
    ]
    cv2.fillPoly(drawn, rings, 1)
    expected = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    union = np.count_nonzero(drawn | expected)
    assert np.count_nonzero(drawn & expected) >= 0.85 * union


def test_masks_of_nothing_and_of_one_pixel() -> None:
    mask = np.zeros((3000, 2000), np.bool_)
    assert outline(mask) == ""
    mask[1500, 1000] = True
    assert outline(mask).count("M") == 1


def test_an_item_holds_the_picture(tmp_path: Path) -> None:
    rgb = np.zeros((600, 1000, 3), np.uint8)
    rgb[:, 500:] = (250, 10, 30)
    (tmp_path / "a.js").write_bytes(encode_item(rgb, (600, 1000), ["M0,0 1,0 1,1Z", ""]))
    item = value_of(tmp_path / "a.js")
    assert (item["w"], item["h"], item["paths"]) == (400, 240, ["M0,0 1,0 1,1Z", ""])
    kind, _, data = item["src"].partition(",")
    assert kind == "data:image/jpeg;base64"
    import base64
    import io

    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert back.shape == (240, 400, 3)
    assert np.abs(back[100, 300].astype(int) - (250, 10, 30)).max() < 12


# --- in a browser ---------------------------------------------------------------------------------


def a_record(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "id": f"photo-{number}",
        "image": f"street/{number:05d}.jpg",
        "expression": f"the car number {number}",
        "height": 300,
        "width": 400,
        "area": 5000,
        "score": (number * 37 % 1000) / 1000,
        "no_target": number % 10 == 0,
        "mask": f"masks/street/{number:05d}.jpg__0.png",
        **changed,
    }


def write_page(folder: Path, images: int, *, items: bool = False) -> Path:
    gallery = Gallery(folder, {"model": "0123456789abcdef"}, into(folder))
    rgb = np.full((300, 400, 3), 120, np.uint8)
    paths = ["M20,20 120,20 120,200 20,200Z", "M220,60 300,60 300,160Z", "M50,240 90,240 90,280Z"]
    for number in range(images):
        name = f"gallery/items/street/{number:05d}.jpg__0.js" if items else None
        if name is not None:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encode_item(rgb, (300, 400), paths))
        records = [a_record(number, id=f"photo-{number}#{k}") for k in range(3)]
        failures = []
        if number % 500 == 7:
            failures = [{"id": f"f{number}", "expression": "the bus", "message": "cut short"}]
        gallery.add(Row(f"street/{number:05d}.jpg", records, failures, name))
    return gallery.finish()


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium here")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def shown(browser: Browser, page: Path, fragment: str = "", *, until: str) -> str:
    """The page's HTML once an expression is true in it, and the console has said nothing."""
    browser.open(page, fragment)
    browser.wait_for(until)
    assert browser.messages == []
    return str(browser.run("document.documentElement.outerHTML"))


@pytest.mark.slow
def test_ten_thousand_images_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path, 10_000)
    dom = shown(
        browser, page, until="document.querySelector('.where').textContent.endsWith(' of 209')"
    )
    assert "1–48 of 10,000 images, page 1 of 209" in dom
    assert "10,000 images, 30,020 expressions: 27,000 masks, 3,000 with no target, 20 failed" in dom
    assert dom.count("<article") == 48
    body = re.sub(r"<script>.*?</script>", "", dom, flags=re.S)
    assert len(re.findall(r"<[a-z]", body)) < 3000  # nodes do not grow with the run


def test_filters_and_hostile_text_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, {}, into(tmp_path), model=HOSTILE, warning=f"{HOSTILE} warns")
    item = encode_item(np.full((30, 40, 3), 90, np.uint8), (30, 40), ["M2,2 20,2 20,20Z"])
    for name in ("a", "b"):
        place = tmp_path / f"gallery/items/{name} #1%.js"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(item)
        gallery.add(
            Row(
                f"{name}.jpg",
                [a_record(1, expression=f"{HOSTILE} {name}", score=0.9 if name == "a" else 0.2)],
                [],
                f"gallery/items/{name} #1%.js",
            )
        )
    dom = shown(
        browser,
        gallery.finish(),
        "#text=script+ALERT&low=50&sort=low",
        until="document.querySelector('path.mask')",
    )
    assert "1–1 of 1 images" in dom
    assert "By the model &lt;/script&gt;&lt;script&gt;alert(1)" in dom
    warning = re.search(r'<p id="warning" class="notice" role="note">(.*?)</p>', dom, re.S)
    assert warning is not None
    assert warning[1].endswith("&lt;!-- warns")
    assert "&lt;img src=x onerror=alert(2)&gt;" in dom
    assert re.search(r'<path class="mask" d="M2,2 20,2 20,20Z">', dom)
    assert "data:image/jpeg;base64" in dom


def test_the_run_of_a_fake_network_in_a_browser(
    browser: Browser, pictures: Path, tmp_path: Path
) -> None:
    Run([pictures], tmp_path / "out", model=FakeModel(), saving=HTML).go()
    page = tmp_path / "out/gallery/index.html"
    dom = shown(browser, page, "#show=failed", until="document.querySelector('article')")
    assert dom.count("<article") == 1
    assert "not an image" in dom
    assert re.search(r'<p id="warning"[^>]* hidden', dom)


def test_masks_of_an_earlier_run_become_a_gallery(pictures: Path, tmp_path: Path) -> None:
    """``export-masks --to html`` gives the pictures and outlines that ``--save html`` gives."""
    from risam_cli.cli import main

    Run([pictures], tmp_path / "out", saving=HTML).go()
    args = ["export-masks", str(tmp_path / "out"), "--to", "html", "-o", str(tmp_path / "page")]
    assert main(args) == 0
    own, exported = rows_of(tmp_path / "out"), rows_of(tmp_path / "page")
    own = [row for row in own if "e" in row]
    assert [row["i"] for row in exported] == [row["i"] for row in own]
    for mine, theirs in zip(own, exported, strict=True):
        assert [one[:4] for one in theirs["e"]] == [one[:4] for one in mine["e"]]
        assert value_of(tmp_path / "page/gallery" / theirs["k"]) == value_of(
            tmp_path / "out/gallery" / mine["k"]
        )
