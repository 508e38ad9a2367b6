"""Expressions, categories and file names that are HTML: pages show them, and run none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import hostile_images
from support.browser import Browser, find_browser

from risam_cli import cli
from risam_cli.training.page import write_page

SCRIPT = "window.owned=1"
PAYLOADS = (
    f"<script>{SCRIPT}</script>",
    f"<img src=x onerror={SCRIPT}>",
    f'"><svg onload={SCRIPT}>',
    f"'-{SCRIPT}-'",
    f"</script><script>{SCRIPT}</script>",
    f"]]><script>{SCRIPT}</script>",
    f"{{{{ {SCRIPT} }}}}${{{SCRIPT}}}",
    f"javascript:{SCRIPT}",
    f"</title></style></textarea></svg><script>{SCRIPT}</script>",
    "\u2028\u2029\x00\x1b[31m\ud800\u202e<b>bold</b>",
    "&lt;b&gt;&#x3c;script&#x3e;",
)

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def _harmless(browser: Browser, page: Path, until: str = "document.body") -> str:
    """The text that a page shows at last, once it is clear that nothing of the payloads ran."""
    browser.open(page)
    browser.wait_for(until)
    assert browser.run("window.owned") is None
    assert browser.run("document.querySelectorAll('img[src=x], [onload], [onerror]').length") == 0
    assert browser.run("document.querySelectorAll('a[href^=javascript]').length") == 0
    return str(browser.run("document.documentElement.textContent"))


def test_the_report_of_an_evaluation(browser: Browser, tmp_path: Path) -> None:
    images = [
        {"id": k, "file_name": f"{text}.png", "height": 24, "width": 32}
        for k, text in enumerate(PAYLOADS)
    ]
    annotations = [
        {"id": k, "image_id": k, "category_id": k, "segmentation": [[1, 1, 20, 1, 20, 20]]}
        for k in range(len(PAYLOADS))
    ]
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": text} for k, text in enumerate(PAYLOADS)],
        "expressions": [
            {"id": text, "image_id": k, "ann_ids": [k], "text": text}
            for k, text in enumerate(PAYLOADS)
        ],
    }
    folder = tmp_path / "<script>window.owned=1<"
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(coco))
    record = {"segmentation": {"size": [24, 32], "counts": [100, 50, 618]}}
    with open(folder / "p.jsonl", "w") as out:
        for text in PAYLOADS:
            row = {"id": text, "image": f"{text}.png", "expression": text}
            out.write(json.dumps(row | record) + "\n")
    data = ["--dataset", "coco", "--root", str(folder / "c.json"), "--split", "all"]
    common = ["--predictions", str(folder / "p.jsonl"), "-o", str(tmp_path / "out")]
    assert cli.main(["eval", *data, *common]) == 0
    shown = _harmless(browser, tmp_path / "out/report.html")
    for text in PAYLOADS[:3]:
        assert text in shown
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<script>" not in markdown
    assert "<img" not in markdown


def test_the_page_of_a_training(browser: Browser, tmp_path: Path) -> None:
    texts = [text for text in PAYLOADS if "\ud800" not in text]
    stage = {"name": texts[0], "kind": "referring", "steps": 9, "images_per_step": 1}
    stage |= {"learning_rate": 1e-3, "train_encoder": texts[1]}
    resolved = {"name": texts[0], "output": texts[1], "stages": [stage], "best_by": texts[2]}
    (tmp_path / "config.resolved.yaml").write_text(json.dumps(resolved))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in (1, 2, 3):
            row = {"stage": 0, "name": texts[0], "step": step, "seconds": 1.0, "expressions": 1}
            train = row | {"kind": "train", "loss": 1.0, "lr": 1.0} | dict.fromkeys(texts, 0.5)
            figures = {f"{text}.{name}": 0.5 for text in texts for name in ("miou", "oiou")}
            val = row | {"kind": "val", "best": 0.5} | figures
            file.write(json.dumps(train) + "\n" + json.dumps(val) + "\n")
    page = write_page(tmp_path, ["risam", "train", *texts], texts[0])
    shown = _harmless(browser, page)
    assert all(text in shown for text in texts[:3])


def test_the_gallery_of_a_run(browser: Browser, tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "<img src=x onerror=window.owned=1>.png").write_bytes(hostile_images.saved("PNG"))
    rows = [
        {"image": next(folder.iterdir()).name, "expression": text, "id": text}
        for text in PAYLOADS
        if "\ud800" not in text
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(model_folder), "-o", str(tmp_path / "out"), "--save", "html"]
    assert cli.main(["predict", str(folder / "m.jsonl"), *common]) == 0
    page = tmp_path / "out/gallery/index.html"
    shown = _harmless(browser, page, "document.querySelector('article [data-state=there]')")
    assert all(text in shown for text in PAYLOADS[:3])
