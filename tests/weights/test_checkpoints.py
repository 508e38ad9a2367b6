"""Model folders and files: whole or not at all, and read without trust."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.networks import TEXTS, noise
from torch import Tensor

from risam_cli.errors import ModelError, OutputError, RisamError
from risam_cli.files.write import write_file
from risam_cli.weights import folder as model_folders
from risam_cli.weights.folder import (
    find_model,
    hash_folder,
    inspect_model_folder,
    read_model_folder,
    write_model_folder,
)
from risam_cli.weights.load import load_model, verify_model_folder

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "models" / "mine")


def _write(folder: Path, weights: dict[str, Tensor], like: Path) -> None:
    stored = read_model_folder(like)
    write_model_folder(
        folder, weights, stored.settings, stored.text_config, stored.tokenizer, {"name": "n"}, "r"
    )


def test_a_round_trip_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device=CPU).model
    weights = {n: t + 0.25 for n, t in model.state_dict().items()}
    # As training holds them: another memory format, gradients on.
    weights = {
        n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
        for n, t in weights.items()
    }
    weights["project_position.weight"].requires_grad_()
    _write(tmp_path / "new", weights, folder)
    loaded = load_model(tmp_path / "new", device=CPU)
    assert loaded.name == "new"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert verify_model_folder(tmp_path / "new") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "new"]


def test_bfloat16_weights_load_as_float32(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    loaded = load_model(folder, device=CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    tokens = loaded.tokenizer.encode(TEXTS)
    with torch.no_grad():
        found = loaded.model(
            noise(1, 3, 64, 64), tokens.input_ids, tokens.attention_mask, torch.zeros(4).long()
        )
    assert torch.isfinite(found.mask_logits).all()


@pytest.mark.parametrize("name", model_folders.NEEDED_FILES)
def test_the_hash_is_that_of_the_contents(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert hash_folder(copy) == hash_folder(folder) == load_model(folder, device=CPU).hash
    (folder / "README.md").write_text("other words\n")
    assert hash_folder(copy) == hash_folder(folder)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    assert hash_folder(copy) != hash_folder(folder)


# --- damage ---------------------------------------------------------------------------------------


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def _bytes(
    make: Callable[[bytes], bytes], name: str = "model.safetensors"
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(make((folder / name).read_bytes()))

    return damage


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the safetensors header, the tensors' bytes left as they are."""

    def make(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return _bytes(make)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(data: bytes) -> bytes:
        config = json.loads(data)
        change(config)
        return json.dumps(config).encode()

    return _bytes(make, "config.json")


POSITION = "project_position.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "cut": (_bytes(lambda b: b[:-1000]), "is damaged"),
    "cut in the header": (_bytes(lambda b: b[:100]), "is damaged"),
    "empty": (_bytes(lambda b: b""), "is damaged"),
    "header length lies": (_bytes(lambda b: struct.pack("<Q", 2**60) + b[8:]), "is damaged"),
    "offsets lie": (
        _header(lambda h: h[POSITION].update(data_offsets=[0, 2**40])),
        "is damaged",
    ),
    "offsets overlap": (
        _header(lambda h: h[POSITION].update(data_offsets=[0, 4 * 32 * 32])),
        "is damaged",
    ),
    "shape lies": (_header(lambda h: h[POSITION].update(shape=[2**40, 2**40])), "is damaged"),
    "trailing bytes": (_bytes(lambda b: b + b"\0" * 64), "is damaged"),
    "a tensor missing": (
        _weights(lambda w: w.pop(POSITION)),
        f"lacks 1 tensors, first '{POSITION}'",
    ),
    "a tensor too many": (
        _weights(lambda w: w.update(extra=torch.ones(1))),
        "has unknown 1 tensors, first 'extra'",
    ),
    "another shape": (
        _weights(lambda w: w.update({POSITION: torch.ones(4, 32)})),
        r"project_position.weight is \(4, 32\), its config.json says \(32, 32\)",
    ),
    "config is no JSON": (_bytes(lambda b: b[:50], "config.json"), "cannot be read"),
    "config is a list": (_bytes(lambda b: b"[]", "config.json"), "has format 'list'"),
    "config is deep": (_bytes(lambda b: b"[" * 100_000, "config.json"), "cannot be read"),
    "a later format": (_config(lambda c: c.update(format=99)), "has format 99, this version"),
    "no text section": (_config(lambda c: c.pop("text")), "has no section 'text'"),
    "an unknown setting": (
        _config(lambda c: c["model"]["fusion"].update(blokcs=3)),
        "unknown key 'fusion.blokcs'",
    ),
    "another width": (_config(lambda c: c["model"]["fusion"].update(dim=16)), "config.json says"),
    "an unknown text model": (
        _config(lambda c: c["text"].update(model_type="nonesuch")),
        "text encoder cannot be built",
    ),
    "tokenizer is no tokenizer": (
        _bytes(lambda b: b"{}", "tokenizer.json"),
        "text encoder cannot be built",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_named_with_what_is_wrong(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(RisamError, match=message) as raised:
        load_model(folder, device=CPU)
    assert str(folder) in raised.value.message
    assert "\n" not in str(raised.value)
    problems = verify_model_folder(folder)
    assert len(problems) == 1
    assert problems[0] == str(raised.value)


def test_verify_finds_numbers_that_are_none(folder: Path) -> None:
    _weights(lambda w: w[POSITION][0].fill_(np.nan))(folder)
    assert verify_model_folder(folder) == [f"1 tensors hold NaN or infinity, first '{POSITION}'"]


def test_inspect_reads_headers_and_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folders, "read_tensors", None)
    facts = inspect_model_folder(folder)
    weights = load_file(folder / "model.safetensors")
    assert facts["parameters"] == sum(t.numel() for t in weights.values())
    assert facts["card"]["figures"] == {"miou": 0.125}
    (folder / "card.json").write_text("{")
    with pytest.raises(ModelError, match=r"card\.json cannot be read"):
        inspect_model_folder(folder)


def test_models_are_found_by_path_and_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folders, "BUNDLED", tmp_path / "models")
    assert find_model(folder) == folder
    assert find_model("mine") == tmp_path / "models" / "mine"
    monkeypatch.setattr(model_folders, "DEFAULT_MODEL", "mine")
    assert find_model(None) == find_model("mine")
    with pytest.raises(ModelError, match="no model folder 'yours'") as raised:
        find_model("yours")
    assert "mine" in raised.value.fix


# --- writing --------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_replaced_whole(folder: Path) -> None:
    weights = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "stray").write_text("of an older version")
    before = hash_folder(folder)
    _write(folder, weights, folder)
    assert hash_folder(folder) != before
    assert not (folder / "stray").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["system", "safetensors"],
)
def test_a_full_disk_leaves_the_old_folder_and_no_litter(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(folder / "model.safetensors")
    before = hash_folder(folder)

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=r"cannot write .*mine: .*No space left"):
        _write(folder, weights, folder)
    assert hash_folder(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["mine"]


def test_a_place_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    weights = load_file(folder / "model.safetensors")
    with pytest.raises(OutputError, match=r"cannot write .*file.*best"):
        _write(tmp_path / "file" / "best", weights, folder)


def test_write_file_replaces_whole_or_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_file(path, lambda place: place.write_text("one"))
    assert path.read_text() == "one"

    def fail(place: Path) -> None:
        place.write_text("half")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    with pytest.raises(OutputError, match=r"cannot write .*state\.pt: Pytorch.*file write failed"):
        write_file(path, fail)
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_whoever_may_read_new_files_may_read_the_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "model.safetensors", lambda t: save_file({"x": torch.ones(1)}, t))
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
