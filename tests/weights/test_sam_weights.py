"""SAM's published layouts, read strictly; damaged, hostile and foreign files, refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.networks import encoder, noise, reference_encoder, relative_error, save_pth
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.errors import ModelError
from risam_cli.model import image_encoder
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.settings.presets import PRESETS
from risam_cli.weights.sam import load_sam_encoder, read_sam

Weights = dict[str, Tensor]


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    return save_pth(tmp_path / "sam.pth", reference_encoder())


def _weights(path: Path) -> Weights:
    held: Weights = torch.load(path, weights_only=True)
    return held


def test_every_weight_arrives_and_only_adapters_keep_their_own(pth: Path) -> None:
    ours = encoder(adapter_dim=4)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    digest = load_sam_encoder(ours, pth)
    assert digest == hashlib.sha256(pth.read_bytes()).hexdigest()
    weights = _weights(pth)
    own = ours.state_dict()
    assert {f"image_encoder.{n}" for n in own if ".adapter." not in n} == set(weights)
    for name, tensor in own.items():
        kept = before[name] if ".adapter." in name else weights[f"image_encoder.{name}"]
        assert torch.equal(tensor, kept), name


def test_other_parts_of_the_file_are_no_matter(tmp_path: Path) -> None:
    extra = nn.Linear(2, 2)
    path = save_pth(
        tmp_path / "sam.pth", reference_encoder(), prompt_encoder=extra, mask_decoder=extra
    )
    load_sam_encoder(encoder(), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(pth: Path, dtype: torch.dtype) -> None:
    torch.save({name: t.to(dtype) for name, t in _weights(pth).items()}, pth)
    ours = encoder()
    load_sam_encoder(ours, pth)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    expected = _weights(pth)["image_encoder.pos_embed"].float()
    assert torch.equal(ours.pos_embed, expected)


def test_files_older_than_the_zip_format_load(pth: Path) -> None:
    torch.save(_weights(pth), pth, _use_new_zipfile_serialization=False)
    load_sam_encoder(encoder(), pth)


def test_a_safetensors_file_loads(pth: Path, tmp_path: Path) -> None:
    path = tmp_path / "sam.safetensors"
    save_file(_weights(pth), path)
    ours, other = encoder(), encoder()
    load_sam_encoder(ours, pth)
    load_sam_encoder(other, path)
    assert torch.equal(ours.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """A random ``SamModel`` of a small width, as ``transformers`` builds it."""
    from support.networks import randomize
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 4, "mlp_dim": 128,
            "num_attention_heads": 4, "image_size": 160, "patch_size": 16, "window_size": 4,
            "global_attn_indexes": [1, 3], "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 160, "patch_size": 16},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    return randomize(SamModel(config), seed=3).eval()


def _deep(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.vision_encoder(pixels)[0]
    return result


@pytest.mark.parametrize("layout", ["one file", "shards", "pickle", "pickled shards"])
def test_a_hugging_face_folder_is_the_same_encoder(
    hugging_face: Any, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "sam-vit-tiny"
    size = "40KB" if "shards" in layout else "1GB"
    hugging_face.save_pretrained(folder, max_shard_size=size)
    assert (folder / "model.safetensors.index.json").is_file() == ("shards" in layout)
    if "pickle" in layout:
        _as_pickles(folder)
    ours = encoder()
    digest = load_sam_encoder(ours, folder)
    assert len(digest) == 64
    assert digest == load_sam_encoder(encoder(), folder)
    pixels = noise(2, 3, 160, 160)
    with torch.no_grad():
        found = ours(pixels)
    assert relative_error(found.deep, _deep(hugging_face, pixels)) < 1e-5


def _as_pickles(folder: Path) -> None:
    """Turns a safetensors folder into the older ``pytorch_model.bin`` layout."""
    from safetensors.torch import load_file

    for path in folder.glob("model*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_the_vision_part_alone_loads(hugging_face: Any, tmp_path: Path) -> None:
    weights = {n: t.clone() for n, t in hugging_face.state_dict().items() if n.startswith("vision")}
    save_file(weights, tmp_path / "model.safetensors")
    ours = encoder()
    load_sam_encoder(ours, tmp_path)
    pixels = noise(1, 3, 160, 160)
    with torch.no_grad():
        assert relative_error(ours(pixels).deep, _deep(hugging_face, pixels)) < 1e-5


# --- other input sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [6, 14])
def test_tables_are_interpolated_at_load_and_never_again(
    pth: Path, grid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, at_run_time = encoder(grid=grid), encoder(grid=10)
    load_sam_encoder(ours, pth)
    load_sam_encoder(at_run_time, pth)
    table = _weights(pth)["image_encoder.blocks.1.attn.rel_pos_h"]
    expected = F.interpolate(table.t()[None], size=2 * grid - 1, mode="linear")[0].t()
    assert torch.allclose(ours.blocks[1].attn.rel_pos_h, expected, atol=1e-6)
    windowed = _weights(pth)["image_encoder.blocks.0.attn.rel_pos_h"]
    assert torch.equal(ours.blocks[0].attn.rel_pos_h, windowed)

    pixels = noise(1, 3, 16 * grid, 16 * grid)
    with torch.no_grad():
        expected_deep = at_run_time(pixels).deep
        monkeypatch.setattr(image_encoder, "resize_rel_pos", None)
        monkeypatch.setattr(F, "interpolate", None)
        assert relative_error(ours(pixels).deep, expected_deep) < 1e-5


# --- what does not fit ----------------------------------------------------------------------------


def _edit(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        weights = _weights(path)
        change(weights)
        torch.save(weights, path)

    return edit


def _bytes(make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(make(path.read_bytes())), None)[1]


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        _edit(lambda w: w.pop("image_encoder.blocks.2.attn.proj.bias")),
        r"lacks 1 tensors of the image encoder: blocks\.2\.attn\.proj\.bias",
    ),
    "surplus": (
        _edit(lambda w: w.update({"image_encoder.blocks.0.gate": torch.ones(1)})),
        r"has unknown 1 tensors .*: blocks\.0\.gate",
    ),
    "shape": (
        _edit(lambda w: w.update({"image_encoder.neck.0.weight": torch.ones(3, 32, 1, 1)})),
        r"neck\.0\.weight is \(3, 32, 1, 1\), the model's is \(16, 32, 1, 1\)",
    ),
    "integers": (
        _edit(lambda w: w.update({"image_encoder.neck.1.bias": torch.ones(16, dtype=torch.long)})),
        r"neck\.1\.bias holds torch\.int64",
    ),
    "no square": (
        _edit(lambda w: w.update({"image_encoder.pos_embed": torch.ones(1, 10, 9, 32)})),
        r"pos_embed is \(1, 10, 9, 32\), not a square",
    ),
    "no sam": (
        _edit(lambda w: (w.clear(), w.update({"visual.conv1.weight": torch.ones(1)}))),
        r"no weights of a SAM encoder, only visual\.conv1\.weight",
    ),
    "nested": (
        _edit(lambda w: (held := dict(w), w.clear(), w.update(model=held))),
        "not a plain table of weights",
    ),
    "cut": (_bytes(lambda b: b[: len(b) // 2]), "cannot be read as plain weights"),
    "empty": (_bytes(lambda b: b""), "cannot be read"),
    "web page": (_bytes(lambda b: b"<!DOCTYPE html><html>Sign in</html>"), "cannot be read"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_files_that_do_not_fit_are_refused_whole(pth: Path, case: str) -> None:
    damage, message = UNFIT[case]
    damage(pth)
    ours = encoder()
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    with pytest.raises(ModelError, match=message) as raised:
        load_sam_encoder(ours, pth)
    assert str(pth) in raised.value.message
    assert raised.value.fix
    assert all(torch.equal(p, before[name]) for name, p in ours.state_dict().items())


def test_another_size_is_named_with_the_preset_that_fits(tmp_path: Path) -> None:
    weights = {f"image_encoder.blocks.{i}.norm1.bias": torch.ones(1024) for i in range(24)}
    weights["image_encoder.patch_embed.proj.weight"] = torch.ones(1024, 3, 16, 16)
    torch.save(weights, tmp_path / "sam_vit_l.pth")
    with torch.device("meta"):
        values = PRESETS["vit_b"]["image_encoder"]
        ours = ImageEncoder(**{**values, "taps": tuple(values["taps"])})
    with pytest.raises(ModelError, match=r"is a ViT-L .* encoder is a ViT-B") as raised:
        load_sam_encoder(ours, tmp_path / "sam_vit_l.pth")
    assert "model.preset: vit_l" in raised.value.fix
    with pytest.raises(ModelError, match="a ViT of width 32, 4 blocks"):
        load_sam_encoder(encoder(), tmp_path / "sam_vit_l.pth")


def test_other_windows_and_global_blocks_are_not_interpolated_away(pth: Path) -> None:
    for ours in (encoder(window=5), encoder(global_blocks=(0, 3))):
        with pytest.raises(ModelError, match=r"rel_pos_h has .* rows, .* needs") as raised:
            load_sam_encoder(ours, pth)
        assert "global_blocks" in raised.value.fix


def test_a_stem_and_a_sam_checkpoint_exclude_each_other(pth: Path) -> None:
    ours = ImageEncoder(
        image_size=64, patch_size=16, dim=32, depth=4, heads=4, mlp_ratio=4.0, out_dim=16, window=4,
        global_blocks=(1, 3), taps=(0, 2, 3), adapter_dim=0, stem=(4, 8, 12),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"image_encoder\.stem is set"):
        load_sam_encoder(ours, pth)


class _Hostile:
    """Pickles to a call that would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "folder"])
def test_a_file_with_code_is_refused_before_it_runs(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "pytorch_model.bin"
    value = {"image_encoder.pos_embed": _Hostile(mark)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ModelError, match="nothing in it was run"):
        load_sam_encoder(encoder(), tmp_path if kind == "folder" else path)
    assert not mark.exists()


def test_a_path_with_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no SAM checkpoint at .*gone\.pth"):
        read_sam(tmp_path / "gone.pth")
    with pytest.raises(ModelError, match=r"holds none of .*model\.safetensors"):
        read_sam(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../../etc/passwd"}}', "names a file outside its folder"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "which is missing"),
        ('{"weight_map": [1]}', "not an index of weights"),
        ("[" * 100_000, "not an index of weights"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        read_sam(tmp_path)


def test_a_damaged_safetensors_folder_is_named(hugging_face: Any, tmp_path: Path) -> None:
    hugging_face.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_sam_encoder(encoder(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam"
