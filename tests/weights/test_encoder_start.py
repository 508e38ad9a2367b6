"""An image encoder may start from an earlier training's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from risam_cli.errors import ModelError
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.weights.start import start_encoder
from risam_cli.weights.torch_files import seal_file


def encoder(**changes: Any) -> ImageEncoder:
    sizes: dict[str, Any] = {
        "image_size": 64,
        "patch_size": 16,
        "dim": 16,
        "depth": 3,
        "heads": 2,
        "mlp_ratio": 2.0,
        "out_dim": 8,
        "window": 2,
        "global_blocks": (2,),
        "taps": (0, 1, 2),
        "adapter_dim": 0,
        "stem": (4, 8, 8),
    }
    return ImageEncoder(**{**sizes, **changes})


def write(path: Path, module: ImageEncoder) -> str:
    state = {f"image_encoder.{name}": value for name, value in module.state_dict().items()}
    torch.save({"format": 1, "model": {**state, "text_encoder.x": torch.ones(2)}}, path)
    seal_file(path)
    return str(path)


def test_every_weight_is_taken_and_adapters_may_be_new(tmp_path: Path) -> None:
    first, second = encoder(), encoder(adapter_dim=4)
    start_encoder(second, write(tmp_path / "last.pt", first))
    held = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(held[name], value), name
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(first(pixels).deep, second(pixels).deep)


def test_the_stem_in_the_deep_features_may_be_new(tmp_path: Path) -> None:
    first = encoder(stem=(4, 8, 12))
    second = encoder(stem=(4, 8, 12), stem_in_deep=True)
    start_encoder(second, write(tmp_path / "last.pt", first))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(first(pixels).deep, second(pixels).deep)


def test_the_bundled_model_is_a_source() -> None:
    bundled = {
        "image_size": 256,
        "dim": 192,
        "depth": 6,
        "heads": 6,
        "mlp_ratio": 4.0,
        "out_dim": 128,
        "window": 8,
        "global_blocks": (1, 3, 4, 5),
        "taps": (1, 3, 5),
        "stem": (24, 48, 96),
        "stem_in_deep": True,
    }
    module = encoder(**bundled)
    before = module.blocks[0].mlp.lin1.weight.clone()
    start_encoder(module, "refshapes-tiny")
    assert not torch.equal(before, module.blocks[0].mlp.lin1.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, r"is \(.*16.*\), the encoder's is \(.*32"),
        ({"depth": 4, "taps": (0, 1, 3)}, "has no image encoder weight blocks.3"),
    ],
)
def test_another_encoder_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    source = write(tmp_path / "last.pt", encoder())
    with pytest.raises(ModelError, match=message):
        start_encoder(encoder(**changes), source)


def test_adapters_are_not_dropped_in_silence(tmp_path: Path) -> None:
    source = write(tmp_path / "last.pt", encoder(adapter_dim=4))
    with pytest.raises(ModelError, match=r"has a weight that the encoder lacks: .*adapter"):
        start_encoder(encoder(), source)


@pytest.mark.parametrize("content", [b"", b"no zip", {"format": 1}, [1, 2]])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"last\.pt"):
        start_encoder(encoder(), str(path))


def test_a_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    first = encoder()
    path = Path(write(tmp_path / "last.pt", first))
    data = bytearray(path.read_bytes())
    data[data.find(first.pos_embed.detach().numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"last\.pt is damaged") as raised:
        start_encoder(encoder(), str(path))
    assert "name another" in raised.value.fix  # It may be one's own: nowhere to download.


def test_a_checkpoint_without_the_encoder_points_to_the_model(tmp_path: Path) -> None:
    """Weights that no stage has trained are not in it."""
    torch.save({"format": 2, "model": {"text_encoder.x": torch.ones(2)}}, tmp_path / "last.pt")
    seal_file(tmp_path / "last.pt")
    with pytest.raises(ModelError, match="has no image encoder weight") as raised:
        start_encoder(encoder(), str(tmp_path / "last.pt"))
    assert "best/" in raised.value.fix


def test_a_sam_file_is_told_where_it_belongs(tmp_path: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.ones(2)}, tmp_path / "sam.pth")
    with pytest.raises(ModelError, match=r"init_encoder_from .*sam\.pth") as raised:
        start_encoder(encoder(), str(tmp_path / "sam.pth"))
    assert "model.image_encoder.checkpoint" in raised.value.fix


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Code()}, tmp_path / "last.pt")
    with pytest.raises(ModelError):
        start_encoder(encoder(), str(tmp_path / "last.pt"))
    assert not (tmp_path / "ran").exists()
