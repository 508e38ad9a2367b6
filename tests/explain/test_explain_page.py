"""The page of ``risam explain``: what it holds, and what it does in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import explain_cases as cases
from support.browser import Browser, find_browser

from risam_cli.cli import main
from risam_cli.explain.page import to_html

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=alert(1)> {{ 7*7 }} star"
)
NAME = "<b onclick=alert(2)>\u202e & 'it'.png"
VOID = frozenset(("meta", "img", "input", "wbr", "path", "rect"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A page of two expressions over an image of 60 x 30, all texts hostile, two points."""
    folder = tmp_path_factory.mktemp("explain")
    pixels = np.random.default_rng(1).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / NAME)
    common = ("--model", str(model_folder), "--device", "cpu", "-o", str(folder / "out"))
    points = ("--point", "50,20", "--point", "3,4")
    image = str(folder / NAME)
    assert main(["explain", image, "-e", "the red star", "-e", HOSTILE, *points, *common]) == 0
    return folder / "out" / "explain.html"


class _Reader(HTMLParser):
    """Collects tags, and what the one data block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)


@pytest.fixture(scope="module")
def reader(page: Path) -> _Reader:
    found = _Reader()
    found.feed(page.read_text(encoding="utf-8"))
    found.close()
    assert found.open == []
    return found


def test_the_page_needs_nothing_else(page: Path, reader: _Reader) -> None:
    text = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|@import|url\(|@font-face", text)
    for tag, attributes in reader.seen:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/webp;base64,")


def test_only_its_own_script_may_run(reader: _Reader) -> None:
    policy = next(
        attributes["content"] or ""
        for tag, attributes in reader.seen
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert len(reader.scripts) == 2
    digest = hashlib.sha256(reader.scripts[1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy
    data = json.loads(reader.scripts[0])
    assert len(data["expressions"]) == 2
    shown = " ".join(reader.words)
    assert HOSTILE in shown
    assert "{{ 7*7 }}" in shown


def test_controls_have_names_and_the_image_is_reached_by_keyboard(reader: _Reader) -> None:
    stage = next(a for _, a in reader.seen if a.get("id") == "stage")
    assert stage["tabindex"] == "0"
    assert stage["role"] == "application"
    assert "Arrow keys" in (stage["aria-label"] or "")
    assert next(a for _, a in reader.seen if a.get("id") == "said")["aria-live"] == "polite"
    assert next(a for t, a in reader.seen if t == "img")["alt"]
    assert next(a for t, a in reader.seen if t == "html")["lang"] == "en"
    tags = [tag for tag, _ in reader.seen]
    # Every control stands inside its label.
    assert tags.count("label") == tags.count("select") + tags.count("input") == 7


# --- in a browser ---------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def _lit(browser: Browser) -> bool:
    return bool(browser.run("document.getElementById('stage').classList.contains('lit')"))


def _heat(browser: Browser) -> list[int]:
    """Opacity of each region of the heat map."""
    script = (
        "(() => { const c = document.getElementById('heat');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return Array.from(d).filter((_, k) => k % 4 === 3); })()"
    )
    found: list[int] = browser.run(script)
    return found


def _shares(browser: Browser) -> list[str]:
    script = "[...document.querySelectorAll('.word .of')].map((e) => e.textContent.trim())"
    found: list[str] = browser.run(script)
    return found


def _title(browser: Browser) -> str:
    return str(browser.run("document.getElementById('side-title').textContent"))


@needs_browser
def test_words_light_regions_and_regions_light_words(browser: Browser, page: Path) -> None:
    browser.open(page)
    # It opens with a word lit that says something, and with how to go on.
    assert _lit(browser)
    assert _title(browser) in ("“red” looks at", "“star” looks at")
    assert "How to read this" in browser.run("document.getElementById('readout').textContent")
    browser.point(*browser.middle(".word:nth-child(3)"))
    assert _lit(browser)
    assert _title(browser) == "“red” looks at"
    heat = _heat(browser)
    assert len(heat) == 8  # 2 x 4 regions hold the picture
    assert max(heat) == 230
    assert min(heat) < 230
    x, y = browser.middle("#stage")
    x, y = x + 20, y + 20  # not on the border of two regions
    browser.point(x, y)
    assert not _lit(browser)
    shares = _shares(browser)
    assert len(shares) == 5  # [CLS] the red star [SEP]
    assert sum(float(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=3)
    assert "is informed by" in _title(browser)
    browser.click(x, y)
    browser.point(*browser.middle(".word:nth-child(3)"))
    assert _lit(browser)
    assert _shares(browser) == shares  # the region is held while a word is pointed at
    browser.press("Escape")
    browser.point(1, 1)
    assert not _lit(browser)
    assert _shares(browser) == [""] * 5
    assert _title(browser) == "How to read this"


@needs_browser
def test_shares_are_those_of_the_maps(browser: Browser, page: Path, model_folder: Path) -> None:
    from risam_cli.api.model import load

    image = page.parent.parent / NAME
    attention = load(model_folder, device="cpu").encode(image).attention("the red star")
    weights = attention.words_of_regions(head=1)
    assert weights is not None
    browser.open(page)
    browser.run(
        "(() => { const h = document.getElementById('head'); h.value = '1';"
        "h.dispatchEvent(new Event('change')); })()"
    )
    browser.point(*browser.middle(".point:nth-child(1)"))  # 50,20: row 1, column 3
    for share, weight in zip(_shares(browser), weights[1, 3], strict=True):
        assert float(share.removesuffix(" %")) == pytest.approx(100 * weight, abs=0.6)


@needs_browser
def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    browser.open(page)
    reached = []
    for _ in range(30):
        browser.press("Tab")
        reached.append(
            browser.run("document.activeElement.id || document.activeElement.textContent.trim()")
        )
        if reached[-1] == "red":
            assert _title(browser) == "“red” looks at"
            assert _lit(browser)
            browser.press("Enter")
            pressed = "document.querySelector('.word:nth-child(3)').getAttribute('aria-pressed')"
            assert browser.run(pressed) == "true"
            browser.press("Enter")
            assert browser.run(pressed) == "false"
        if reached[-1] == "stage":
            browser.press("ArrowRight")
            first = _title(browser)
            browser.press("ArrowDown")
            browser.press("ArrowRight")
            assert _title(browser) != first
            assert re.match(
                r"row 2, column 4: \S",
                browser.run("at = document.getElementById('said').textContent"),
            )
            for _ in range(5):
                browser.press("ArrowUp")
                browser.press("ArrowLeft")
            assert _title(browser) == "The region in row 1, column 1 is informed by"
        if reached[-1] == "point 2":
            assert _title(browser) == "The region in row 1, column 1 is informed by"
            break
    controls = ["expression", "block", "head", "scale", "smooth", "outline", "overview"]
    assert reached == [
        *controls,
        "[CLS]",
        "the",
        "red",
        "star",
        "[SEP]",
        "stage",
        "point 1",
        "point 2",
    ]


@needs_browser
def test_a_finger_holds_and_lets_go(browser: Browser, page: Path) -> None:
    browser.open(page, size=(390, 800))
    assert browser.run("document.documentElement.scrollWidth") <= 390
    title = "document.getElementById('side-title').textContent"
    browser.tap(*browser.middle(".word:nth-child(4)"))
    browser.wait_for(f"{title} === '“star” looks at'")  # the browser makes a click of it
    browser.tap(*browser.middle("#stage"))
    browser.wait_for(f"{title}.endsWith('is informed by')")
    browser.tap(*browser.middle("#stage"))
    browser.wait_for(f"{title} === 'How to read this'")


@needs_browser
def test_the_overview_colours_every_region(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click(*browser.middle("#overview"))
    assert min(_heat(browser)) >= 60
    assert _title(browser) == "The word that informs most"
    assert "[CLS]" not in browser.run("document.getElementById('readout').textContent")


@needs_browser
def test_light_and_dark_are_both_readable(browser: Browser, page: Path) -> None:
    script = """(() => {
      const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => {
        x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      return ['h1', '.eyebrow', '.word', '.special', '.answer', '#readout p', 'label', 'summary']
        .map((s) => { const ink = light(getComputedStyle(document.querySelector(s)).color);
          return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
    })()"""
    papers = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        contrasts = browser.run(script)
        assert min(contrasts) >= 4.5, contrasts  # WCAG 2, AA
        papers.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert papers[0] != papers[1]


@needs_browser
def test_hostile_text_is_shown_and_not_run(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run(
        "(() => { const e = document.getElementById('expression'); e.value = '1';"
        "e.dispatchEvent(new Event('change')); })()"
    )
    browser.point(*browser.middle(".word:nth-child(4)"))
    assert "what the network looked at" in browser.run("document.title")
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 1
    assert (
        browser.run("document.querySelector('#expression option:checked').textContent") == HOSTILE
    )
    assert browser.run("document.querySelector('h1').textContent").endswith(NAME)


@needs_browser
@pytest.mark.parametrize(("vision", "language"), [(False, True), (True, False), (False, False)])
def test_pages_of_ablated_models_offer_what_there_is(
    browser: Browser, tmp_path: Path, vision: bool, language: bool
) -> None:
    changes = {"fusion": {"vision_guided": vision, "language_guided": language}}
    attention = cases.attention_of(cases.small_loaded(**changes), cases.noise_image())
    page = tmp_path / "page.html"
    page.write_text(to_html(cases.explanation_of(attention, points=((3, 3),))), encoding="utf-8")
    browser.open(page)
    assert browser.run("document.querySelector('.cautions').textContent") == attention.missing[0]
    assert browser.run("document.querySelector('.word').disabled") == (not language)
    assert browser.run("document.getElementById('stage').tabIndex") == (0 if vision else -1)
    assert browser.run("document.querySelectorAll('.point').length") == int(vision)
    browser.point(*browser.middle("#stage"))
    assert any(_shares(browser)) == vision
    browser.point(*browser.middle(".word:nth-child(3)"))
    assert _lit(browser) == language


@needs_browser
def test_the_console_stayed_silent(browser: Browser) -> None:
    """After all of the above."""
    assert browser.messages == []
