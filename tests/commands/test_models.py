"""``risam models``: list, inspect and verify, on good and on damaged folders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import Cli

from risam_cli.cli import main
from risam_cli.weights.folder import hash_folder


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "models" / "mine")


def test_list_names_the_models_below_a_folder(cli: Cli, copy: Path) -> None:
    shutil.copytree(copy, copy.parent / "deep" / "other")
    done = cli("models", "list", "--dir", copy.parent, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["path"]: row for row in json.loads(done.stdout)}
    mine = rows[str(copy)]
    assert mine["hash"] == hash_folder(copy)
    assert mine["bytes"] == sum(file.stat().st_size for file in copy.iterdir())
    assert mine["parameters"] > 1000
    assert rows[str(copy.parent / "deep" / "other")]["hash"] == mine["hash"]

    text = cli("models", "list", "--dir", copy.parent).stdout
    assert f"{mine['parameters']:,}" in text
    assert mine["hash"][:12] in text


def test_list_shows_a_damaged_model_with_the_reason(cli: Cli, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    done = cli("models", "list", "--dir", copy.parent)
    assert done.returncode == 3
    assert "lacks tokenizer.json" in done.stdout
    assert "Traceback" not in done.stderr


def test_list_of_no_folder_is_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    done = cli("models", "list", "--dir", tmp_path / "none")
    assert done.returncode == 2
    assert "no such folder" in done.stderr


def test_inspect_counts_the_parameters_by_part(cli: Cli, model_folder: Path) -> None:
    done = cli("models", "inspect", model_folder, "--json", "--tensors")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    parts = facts["parameters_by_part"]
    assert {"image_encoder", "text_encoder", "feature_enhancement", "mask_decoder"} <= set(parts)
    counted: dict[str, int] = {}
    for tensor in facts["tensors"]:
        size = 1
        for side in tensor["shape"]:
            size *= side
        part = tensor["name"].split(".")[0]
        counted[part] = counted.get(part, 0) + size
        assert tensor["dtype"] in {"F32", "BF16", "I64", "BOOL"}
    assert parts == counted
    assert facts["parameters"] == sum(counted.values())
    assert facts["card"]["figures"] == {"miou": 0.125}


def test_inspect_is_readable(cli: Cli, model_folder: Path) -> None:
    text = cli("models", "inspect", model_folder, "--tensors").stdout
    assert "image_size: 64" in text
    assert "miou: 0.125" in text
    assert "image_encoder.patch_embed" in text or "image_encoder.stem" in text


def test_verify_says_ok_with_the_hash(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "verify", str(model_folder)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == f"ok  {model_folder}  {hash_folder(model_folder)}\n"


def test_verify_says_that_there_are_no_checksums(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "card.json").unlink(missing_ok=True)
    assert main(["models", "verify", str(copy)]) == 0
    shown = capsys.readouterr()
    assert "no checksums in card.json" in shown.err
    assert shown.out.startswith(f"ok  {copy}")


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _lie_about_the_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + data[8:])


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _put_nan_in(path: Path) -> None:
    """Overwrite the last four bytes of the file: the end of the last tensor."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dtype.kind == "f")
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no settings": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "cut weights": (lambda f: _cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "huge header": (lambda f: _lie_about_the_header(f / "model.safetensors"), "is damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "format"),
    "another format": (lambda f: _edit(f / "config.json", lambda c: c.update(format=99)), "99"),
    "another width": (
        lambda f: _edit(f / "config.json", lambda c: c["model"]["fusion"].update(ffn_dim=64)),
        "config.json",
    ),
    "unknown key": (
        lambda f: _edit(f / "config.json", lambda c: c["model"].update(colour="red")),
        "colour",
    ),
    "unknown text model": (
        lambda f: _edit(f / "config.json", lambda c: c["text"].update(model_type="nonesuch")),
        "nonesuch",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "text encoder"),
    "a card of a list": (lambda f: (f / "card.json").write_text("[]"), "card.json is damaged"),
    "no checksums": (lambda f: _edit(f / "card.json", lambda c: c.update(sha256="")), "card.json"),
    "NaN": (lambda f: _put_nan_in(f / "model.safetensors"), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_wrong(
    damage: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = DAMAGES[damage]
    spoil(copy)
    assert main(["models", "verify", str(copy)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert says in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "Traceback" not in shown.err
    assert main(["models", "verify", str(copy), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["ok"]
    assert len(facts["problems"]) == 1


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_an_unknown_name_is_one_line(cli: Cli, action: str) -> None:
    done = cli("models", action, "no-such-model")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no-such-model" in done.stderr
