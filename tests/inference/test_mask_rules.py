"""From logits to masks on the host: packed or not, by the rule of predict or of a protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.carried import in_order, numbered
from support.predict_fakes import SIZE, FakeModel

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.compute import Ahead, Compute, ComputeSettings, Job, inputs_of
from risam_cli.inference.mask_rules import (
    PackedMask,
    _through_bits,
    at_image_size,
    logit,
    pack,
    to_host,
    unpacked,
)
from risam_cli.inference.pipeline import PredictSettings, predict_samples
from risam_cli.masks import rle as masks
from risam_cli.segmenters.segmenter import GridMaps, Maps
from risam_cli.types import Expression, Sample

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


@given(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13), st.integers(0, 99))
def test_packing_loses_no_pixel(count: int, height: int, width: int, seed: int) -> None:
    given_masks = noise(count, height, width, seed=seed)
    bits = pack(given_masks)
    assert bits.shape == (count, -(-height * width // 8))
    for one, row in zip(given_masks, bits, strict=True):
        flat = one.flatten().numpy()
        assert np.array_equal(row.numpy(), np.packbits(flat, bitorder="little"))
        packed = PackedMask(row.numpy(), (height, width))
        assert np.array_equal(packed.unpack(), one.numpy())
        assert packed.nbytes == one.numel()


def test_masks_of_several_sizes_and_their_figures_come_through_one_copy() -> None:
    groups = [noise(2, 7, 9), noise(1, 64, 48, seed=1), noise(3, 1, 1, seed=2)]
    numbers = torch.rand(3, 6)
    plain, figures = to_host(groups, numbers)
    packed, same = _through_bits(groups, numbers)
    assert same == figures
    assert all(isinstance(one, PackedMask) for one in packed)
    assert len(packed) == len(plain) == 6
    for a, b in zip(packed, plain, strict=True):
        assert np.array_equal(unpacked(a), unpacked(b))


def test_a_threshold_is_of_probabilities() -> None:
    logits = torch.linspace(-4, 4, 64).view(1, 8, 8)
    maps = GridMaps(logits, sam_frame(8), (8, 8))
    for threshold in (0.1, 0.5, 0.9):
        found = at_image_size(maps, (8, 8), threshold)
        assert torch.equal(found, logits.sigmoid() > threshold)
    assert not at_image_size(maps, (8, 8), 1.0).any()
    assert at_image_size(maps, (8, 8), 0.0).all()
    assert logit(0.5) == 0


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rgb = np.zeros((20, 40, 3), np.uint8)
    rgb[:, 10:30] = 255
    Image.fromarray(rgb).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_rule_decides_where_masks_are_made(picture: Path) -> None:
    asked: list[tuple[tuple[int, int], float]] = []

    def rule(maps: Maps, size: tuple[int, int], threshold: float) -> torch.Tensor:
        asked.append((size, threshold))
        return maps.logits((8, 8)) > 0

    texts = tuple(Expression(text, text) for text in ("x", "bright thing"))
    settings = PredictSettings(CPU, threshold=0.3, keep_raw=True)
    asking = [(Sample("a", picture, texts), None)]
    ((_, result),) = predict_samples(asking, FakeModel(), settings, rule=rule)
    assert asked == [((20, 40), 0.3)]
    assert [raw.mask["size"] for raw in result.raw] == [[8, 8], [8, 8]]
    compute = Compute(FakeModel(), ComputeSettings(CPU, 0.3, 1), rule)
    answers = list(
        compute.run([Job(read_for_encoder(picture, [sam_frame(SIZE)]), ("x", "bright thing"))])
    )
    for answer, raw in zip(answers, result.raw, strict=True):
        (mask,) = answer.masks
        assert np.array_equal(unpacked(mask), masks.decode(raw.mask))


def test_a_packed_answer_is_written_as_any_other(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tuple(Expression(text, text) for text in ("x", "bright thing", "y " * 7))
    sample = Sample("a", picture, texts)
    settings = PredictSettings(CPU, keep_raw=True)
    plain = in_order(predict_samples(numbered([sample]), FakeModel(), settings))
    monkeypatch.setattr("risam_cli.inference.compute.to_host", _through_bits)
    packed = in_order(predict_samples(numbered([sample]), FakeModel(), settings))
    assert [one.predictions for one in packed] == [one.predictions for one in plain]
    assert [one.raw for one in packed] == [one.raw for one in plain]


def test_a_batch_takes_copies_where_there_are_some(picture: Path) -> None:
    images = [read_for_encoder(picture, [sam_frame(SIZE)])] * 2
    there = Ahead(views=(torch.from_numpy(images[0].rgb.copy()),))
    frames = [sam_frame(SIZE)]
    (expected,) = inputs_of(images, [Ahead(), Ahead()], frames, CPU)
    for ahead in ([there, Ahead()], [there, there]):
        (found,) = inputs_of(images, ahead, frames, CPU)
        assert torch.equal(found.values, expected.values)
        assert found.sizes == expected.sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_images_go_ahead_and_masks_come_back(picture: Path) -> None:
    samples = [Sample(f"a{k}", picture, (Expression(f"{k}", "bright thing"),)) for k in range(9)]
    gpu = PredictSettings(torch.device("cuda"), batch_size=4)
    found = in_order(predict_samples(numbered(samples), FakeModel(device="cuda"), gpu))
    expected = in_order(predict_samples(numbered(samples), FakeModel(), PredictSettings(CPU)))
    assert [r.predictions for r in found] == [r.predictions for r in expected]
