"""Numbers of thousands of digits, depth, and damage: one line, never an internal error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.paths import REPO

from risam_cli.cli import main
from risam_cli.errors import ConfigError, DataError
from risam_cli.evaluation.report.compare import _Rows
from risam_cli.files.jsonlines import load_json, unseal
from risam_cli.files.locks import FolderLock
from risam_cli.files.sizes import parse_size
from risam_cli.settings.load import apply_override, check, read_settings_file
from risam_cli.settings.train import TrainSettings
from risam_cli.training.log import read_rows
from risam_cli.weights.plausible import require_affordable

HEX = "0x" + "f" * 6000
DIGITS = "9" * 5000
DEEP = "[" * 100_000
CONFIG = REPO / "configs" / "refshapes_tiny.yaml"


@pytest.mark.parametrize(
    "override",
    [
        *(f"seed={value}" for value in (HEX, DIGITS, "18446744073709551616", "-1", "true", ".nan")),
        f"seed=!!int {HEX}",
        *(f"{key}={10**20}" for key in ("train.scenes", "workers", "threads", "stages.0.steps")),
        f"train.scenes={10**12}",
        f"workers={10**8}",
        f"threads={10**8}",
        f"pictures={10**9}",
        f"stages.0.images_per_step={10**15}",
        f"loss.target_size={10**9}",
        f"optimizer.weight_decay={HEX}",
        "optimizer.weight_decay=true",
        f"model.image_encoder.global_blocks=[{HEX}]",
        f"stages={DEEP}",
        f"{DIGITS}=1",
    ],
)
def test_settings_of_odd_values_are_refused_in_one_line(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(CONFIG), "--set", override, "--print-config"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "internal error" not in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    "override",
    [
        *(f"model.text_encoder.{key}={10**8}" for key in ("hidden", "layers", "max_tokens")),
        *(f"model.image_encoder.{key}={10**8}" for key in ("image_size", "dim", "out_dim")),
        "model.image_encoder.mlp_ratio=1e300",
        f"model.fusion.dim={10**7}",
        f"model.decoder.layers={10**7}",
    ],
)
def test_a_network_that_no_machine_holds_is_refused_before_memory_is_taken(override: str) -> None:
    def start() -> None:
        raw = apply_override(read_settings_file(CONFIG), override)
        require_affordable(check(TrainSettings, raw, "x").model, "x")

    with pytest.raises(ConfigError, match="model"):
        start()


@pytest.mark.parametrize("options", [["--workers", "100000"], ["--feature-cache-limit", DIGITS]])
def test_options_of_odd_values_are_usage_errors(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(tmp_path), "-e", "x", "-o", str(tmp_path / "out")]
    assert main([*command, "--feature-cache", str(tmp_path / "cache"), *options]) in (1, 2)
    assert "internal error" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(f"{DIGITS}GB")


def test_json_is_as_deep_as_python_goes() -> None:
    for text in (DEEP, DEEP.encode(), '{"a":' * 100_000, f'{{"a": {DIGITS}}}', b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
            load_json(text)
    with pytest.raises(ValueError, match="checksum"):
        unseal(DEEP.encode())


def test_damaged_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "stage": 0, "step": 3, "seconds": 1.5, "loss": 0.5}'
    bad = [
        b"\xff\xfe", b"[]", b"7", b"null", DEEP.encode(), b'{"kind": 7, "stage": 0, "step": 1}',
        b'{"kind": "train"}', b'{"kind": "train", "stage": "0", "step": 1}',
        b'{"kind": "train", "stage": NaN, "step": 1}', good[:-9],
        b'{"kind": "val", "stage": 0, "step": 1, "best": "high"}',
        b'{"kind": "train", "stage": 1%s, "step": 1}' % (b"0" * 100),
    ]  # fmt: skip
    path.write_bytes(b"\n".join([*bad, good, *bad]))
    assert [row for _, row in read_rows(path)] == [json.loads(good)]


@pytest.mark.parametrize(
    "row",
    [
        DEEP,
        "[]",
        "7",
        json.dumps({"id": "a"}),
        *(
            f'{{"id": "a", "image": "b", "union": 1, "pred_area": 1, "gt_area": 1, '
            f'"gt_no_target": false, "pred_no_target": false, "score": 1, '
            f'"no_target_probability": 0, "missing": false, "intersection": {value}}}'
            for value in ("1e400", "NaN", "true", DIGITS, "1" + "0" * 30, "-1", '"1"', "[]")
        ),
    ],
)
def test_rows_of_another_report_that_are_damaged_are_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "per_expression.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=str(path)):
        _Rows(path)


def test_a_report_of_great_depth_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(DEEP)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "report.json" in line
    assert "internal error" not in line


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 100,
        b"1" * 5000 + b"\nhost\n",
        b"filelock/2\npid=-1\nhost=x\nmode=lease\ntoken=a\nduration=nan\nstart=1e400\n",
        b"filelock/2\npid="
        + b"9" * 5000
        + b"\nhost=x\nmode=lease\ntoken=a\nduration=30\nstart=1\n",
        DEEP.encode(),
    ],
)
def test_a_lease_of_absurd_content_is_taken_or_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from risam_cli.files import locks

    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(locks, "_RENEWED", 0.1)
    out = tmp_path / "out"
    (out / ".risam").mkdir(parents=True)
    (out / ".risam" / "lock").write_bytes(content)
    with FolderLock(out) as lock:
        lock.require_held()
    shutil.rmtree(out)
