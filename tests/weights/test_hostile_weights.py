"""Torch files by an attacker: SAM's ``.pth``, training checkpoints, what an encoder starts from."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import small_model

from risam_cli.errors import ModelError
from risam_cli.training.checkpoint import read_state
from risam_cli.weights.sam import load_sam_encoder, read_sam
from risam_cli.weights.torch_files import load_plain


class _Runs:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def _saved(value: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _packed(data: bytes, member: str = "", change: Callable[[bytes], bytes] = bytes) -> bytes:
    """The same zip with its members packed; the one that ends in ``member`` changed."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            held = source.read(name)
            target.writestr(name, change(held) if member and name.endswith(member) else held)
    return out.getvalue()


def _hostile(marker: Path) -> dict[str, bytes]:
    weights = {"image_encoder.pos_embed": torch.zeros(1, 4, 4, 8)}
    plain = _saved(weights)
    return {
        "code": _saved({"a": _Runs(marker)}),
        "code, old form": _saved({"a": _Runs(marker)}, zipped=False),
        "code, bare pickle": pickle.dumps(_Runs(marker)),
        "code, protocol 0": pickle.dumps(_Runs(marker), protocol=0),
        "code, second pickle": pickle.dumps({}) + pickle.dumps(_Runs(marker)),
        "packed": _packed(plain),
        "bomb": _packed(plain, "data/0", lambda held: bytes(64 << 20)),
        "whole module": _saved(torch.nn.Linear(2, 2)),
        "spread view": _saved({"image_encoder.a": torch.zeros(1).expand(1 << 40)}),
        "sparse": _saved(
            {"image_encoder.a": torch.zeros(1 << 20, 1 << 20, layout=torch.sparse_coo)}
        ),
        "meta": _saved({"image_encoder.a": torch.zeros(9, device="meta")}),
        "cut": plain[: len(plain) // 2],
        "flipped": plain[:200] + b"\xff" * 64 + plain[264:],
        "empty": b"",
        "text": b"<html>404</html>",
        "zip of nothing": b"PK\x05\x06" + bytes(18),
        "tar": b"\0" * 1024,
    }


@pytest.mark.parametrize("what", sorted(_hostile(Path("x"))))
@pytest.mark.parametrize("mapped", [True, False])
def test_files_that_are_no_plain_weights_are_refused(
    what: str, mapped: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "owned"
    path = tmp_path / "weights.pth"
    path.write_bytes(_hostile(marker)[what])
    with pytest.raises(ModelError):
        load_plain(path, mapped=mapped)
    with pytest.raises(ModelError):
        read_sam(path)
    with pytest.raises(ModelError):
        read_state(path, ["x"])
    assert not marker.exists()


def test_the_hostile_files_would_have_run(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    for what in ("code", "code, old form"):
        torch.load(io.BytesIO(_hostile(marker)[what]), weights_only=False)
        assert marker.exists(), what
        marker.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_are_read(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0)
    value = {"a": base[4:12].view(2, 4), "b": [base, (base, {"c": base.t()})], "n": 3, "s": "x"}
    path = tmp_path / "weights.pth"
    path.write_bytes(_saved(value, zipped=zipped))
    held = load_plain(path, mapped=True)
    torch.testing.assert_close(held["a"], value["a"])
    assert held["n"] == 3


@pytest.mark.parametrize("path", ["/dev/zero", ".", "missing", "pipe"])
def test_only_files_are_read(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is not a file"):
        load_plain(Path(path) if path == "/dev/zero" else tmp_path / path)


def _encoder_weights() -> tuple[Any, dict[str, torch.Tensor]]:
    encoder = small_model(image_encoder={"adapter_dim": 0})[0].image_encoder
    return encoder, {f"image_encoder.{k}": v.clone() for k, v in encoder.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("pos_embed", torch.zeros(1, 4096, 4096, 1)),
        ("pos_embed", torch.zeros(2, 4, 4, 24)),
        ("pos_embed", torch.zeros(1, 0, 0, 24)),
        ("pos_embed", torch.zeros(())),
        ("blocks.2.attn.rel_pos_h", torch.zeros(())),
        ("blocks.2.attn.rel_pos_w", torch.zeros(7, 9999)),
        ("blocks.0.mlp.lin1.weight", torch.zeros(2)),
        ("blocks.0.mlp.lin1.weight", torch.zeros(48, 24, dtype=torch.int64)),
        ("blocks." + "9" * 5000 + ".x", torch.zeros(1)),
    ],
)
def test_tensors_of_odd_shapes_are_told_before_they_are_resized(
    name: str, tensor: torch.Tensor, tmp_path: Path, monkeypatch: Any
) -> None:
    encoder, weights = _encoder_weights()
    path = tmp_path / "sam.pth"
    torch.save(weights, path)
    load_sam_encoder(encoder, path)
    torch.save({**weights, f"image_encoder.{name}": tensor}, path)
    if name == "pos_embed":
        monkeypatch.setattr("risam_cli.weights.sam.resize_pos_embed", None)
    with pytest.raises(ModelError, match=r"sam\.pth"):
        load_sam_encoder(encoder, path)


@pytest.mark.parametrize(
    "state",
    [
        [],
        {},
        {"format": 1},
        {"format": 2, "place": {}},
        {"format": 1, "place": {"stage": "x"}, "settings_hash": "x"},
        {"format": 1, "place": {"stage": 10**9}, "settings_hash": []},
        {"format": 1, "place": {"evil": 1}, "settings_hash": "x"},
        {"format": 1, "place": 3, "settings_hash": "x"},
    ],
)
def test_a_checkpoint_of_odd_values_is_told(state: Any, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        changed = {**state, "format": version} if isinstance(state, dict) and state else state
        torch.save(changed, tmp_path / "last.pt")
        with pytest.raises(ModelError, match=r"last\.pt"):
            read_state(tmp_path / "last.pt", ["x"])


@pytest.mark.parametrize(
    "index",
    [
        "[",
        "[" * 100_000,
        '{"weight_map": {"a": "../../x"}}',
        '{"weight_map": {"a": "/dev/zero"}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "a\\u0000"}}',
        '{"weight_map": {"a": "missing"}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": ' + "9" * 5000 + "}}",
    ],
)
def test_an_index_leads_nowhere_else(index: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ModelError, match="index"):
        read_sam(tmp_path)
