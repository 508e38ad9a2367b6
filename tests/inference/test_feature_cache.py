"""Features from disk give what features just computed give, in train, eval and predict."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from PIL import Image
from support.carried import in_order, numbered
from support.encodes import count_encodes
from support.networks import WITH_STEM, small_model, small_settings

from risam_cli.cli import main
from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.feature_cache import (
    CacheSettings,
    FeatureCache,
    bytes_an_image,
    hash_weights,
    image_key,
    open_feature_cache,
)
from risam_cli.inference.feature_store import Entry, Stored
from risam_cli.inference.finish import ImageResult
from risam_cli.inference.pipeline import PredictSettings, predict_samples
from risam_cli.masks import rle as masks
from risam_cli.model.image_encoder import EncoderFeatures
from risam_cli.model.risam import Risam
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.types import Expression, Sample
from risam_cli.weights.load import LoadedModel

CPU = torch.device("cpu")
TEXTS = ("red circle", "the small blue square")


class Loaded(NamedTuple):
    """As build.LoadedModel."""

    model: Risam
    tokenizer: Any
    settings: Any
    image_size: int = 64
    threshold: float = 0.5
    no_target_threshold: float = 1.0
    name: str = "small"
    hash: str = "0" * 64


def loaded(seed: int = 0, **changes: Any) -> Loaded:
    changes = {**WITH_STEM, **changes}
    model, tokenizer = small_model(seed, **changes)
    return Loaded(model.requires_grad_(False), tokenizer, small_settings(**changes))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        rgb = rng.integers(0, 256, (40 + 20 * number, 70, 3), np.uint8)
        Image.fromarray(rgb).resize((90, 40 + 20 * number)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def predict(
    model: Loaded,
    pictures: Sequence[Path],
    folder: Path | None,
    precision: torch.dtype = torch.float32,
) -> tuple[list[ImageResult], FeatureCache | None]:
    samples = [
        Sample(path.name, path, tuple(Expression(f"{path.name}{text}", text) for text in TEXTS))
        for path in pictures
    ]
    settings = PredictSettings(CPU, precision, keep_raw=True)
    segmenter = RisamSegmenter(cast(LoadedModel, model), CPU, precision)
    if folder is None:
        return in_order(predict_samples(numbered(samples), segmenter, settings)), None
    with open_feature_cache(
        CacheSettings(folder),
        model.model.image_encoder,
        model.settings.image_encoder,
        device=CPU,
        precision=precision,
        images=len(samples),
    ) as cache:
        found = predict_samples(numbered(samples), segmenter, settings, cache=cache)
        return in_order(found), cache


def said(results: Sequence[ImageResult]) -> list[Any]:
    return [
        (p.id, p.segmentation, p.score, raw)
        for result in results
        for p, raw in zip(result.predictions, result.raw, strict=True)
    ]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through any image encoder."""
    return count_encodes(monkeypatch)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_second_run_encodes_nothing_and_says_the_same(
    tmp_path: Path, pictures: list[Path], encoded: list[int], precision: torch.dtype
) -> None:
    model = loaded()
    first, cache = predict(model, pictures, tmp_path, precision)
    assert cache is not None
    assert cache.store.counts.written == len(pictures)
    assert encoded == [1] * len(pictures)
    second, cache = predict(model, pictures, tmp_path, precision)
    assert cache is not None
    assert cache.store.counts.read == len(pictures)
    assert encoded == [1] * len(pictures)
    assert said(first) == said(second)


def test_half_precision_changes_masks_by_next_to_nothing(
    tmp_path: Path, pictures: list[Path]
) -> None:
    model = loaded()
    plain, _ = predict(model, pictures, None)
    kept, _ = predict(model, pictures, tmp_path)
    for (name, mask, score, raw), (other, its_mask, its_score, its_raw) in zip(
        said(plain), said(kept), strict=True
    ):
        assert name == other
        assert its_score == pytest.approx(score, abs=2e-3)
        assert its_raw.no_target == pytest.approx(raw.no_target, abs=2e-3)
        a, b = masks.decode(mask), masks.decode(its_mask)
        assert (a != b).mean() < 2e-3


def test_damage_is_made_anew_and_changes_nothing(
    tmp_path: Path, pictures: list[Path], encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded()
    first, _ = predict(model, pictures, tmp_path)
    one = sorted(tmp_path.rglob("*.safetensors"))[1]
    data = bytearray(one.read_bytes())
    data[-7] ^= 1
    one.write_bytes(data)
    encoded.clear()
    capsys.readouterr()
    second, _ = predict(model, pictures, tmp_path)
    assert encoded == [1]
    assert said(first) == said(second)
    told = capsys.readouterr().err
    assert f"{one} is damaged (its checksum is wrong); it is computed again" in told
    assert "3 read, 1 added" in told
    assert "1 were damaged" in told
    assert one.read_bytes() != data


def test_other_weights_and_other_precision_are_other_features(
    tmp_path: Path, pictures: list[Path], encoded: list[int]
) -> None:
    predict(loaded(), pictures, tmp_path)
    predict(loaded(1), pictures, tmp_path)
    predict(loaded(), pictures, tmp_path, torch.bfloat16)
    assert encoded == [1] * 3 * len(pictures)
    assert len({path.parent.parent for path in tmp_path.rglob("*.safetensors")}) == 3
    # What is trained on top of the encoder does not matter.
    changed = loaded()
    with torch.no_grad():
        next(changed.model.mask_decoder.parameters()).add_(1)
    predict(changed, pictures, tmp_path)
    assert encoded == [1] * 3 * len(pictures)


def test_taps_leave_no_trace_in_the_weights_and_count(
    tmp_path: Path, pictures: list[Path], encoded: list[int]
) -> None:
    hashes = set()
    for taps in ([0, 1, 3], [0, 2, 3], [1, 2, 3], [0, 1, 3]):
        encoder = {**WITH_STEM["image_encoder"], "depth": 4, "taps": taps}
        model = loaded(image_encoder=encoder)
        hashes.add(hash_weights(model.model.image_encoder))
        predict(model, pictures[:1], tmp_path)
    assert len(hashes) == 1
    assert encoded == [1, 1, 1]


def test_every_weight_and_table_counts() -> None:
    encoder = loaded().model.image_encoder
    before = hash_weights(encoder)
    assert before == hash_weights(loaded().model.image_encoder)
    for name, parameter in encoder.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
            assert hash_weights(encoder) != before, name
            parameter.view(-1)[-1] -= 1e-3


def test_the_announced_size_is_the_size(
    tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded()
    _, cache = predict(model, pictures, tmp_path)
    assert cache is not None
    each = bytes_an_image(model.settings.image_encoder)
    for path in tmp_path.rglob("*.safetensors"):
        assert each < path.stat().st_size < each + 1024
    told = capsys.readouterr().err
    assert f"{len(pictures)} images make up to" in told
    assert "limit 50 GB" in told


def opened(folder: Path) -> AbstractContextManager[FeatureCache]:
    """The cache of an encoder that nobody runs."""
    shape, precision = small_settings().image_encoder, torch.float32
    return open_feature_cache(
        CacheSettings(folder),
        torch.nn.Identity(),
        shape,
        device=CPU,
        precision=precision,
        images=None,
    )


def test_values_too_large_for_half_precision_keep_their_size(tmp_path: Path) -> None:
    large = torch.full((1, 4, 2, 2), 1e6)
    given = EncoderFeatures(large, torch.ones(1, 4, 2, 2), torch.zeros(1, 3, 2, 2), None)
    with opened(tmp_path) as cache:
        made = cache.features(["ab" * 16], [None], lambda rows: given)
        cache.close()
        found = cache.find("ab" * 16)
        assert found is not None
        again = cache.features(["ab" * 16], [found], lambda rows: pytest.fail("encoded again"))
    for name in ("shallow", "middle", "deep"):
        assert torch.equal(getattr(made, name), getattr(again, name))
        assert getattr(made, name).dtype == torch.float32
    torch.testing.assert_close(made.shallow, large, rtol=4e-3, atol=0)
    assert torch.equal(made.middle, given.middle)


def test_features_that_wait_for_the_disk_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, given = "ef" * 16, EncoderFeatures(*[torch.ones(1, 2, 2, 2)] * 3, None)
    turn = threading.Event()
    with opened(tmp_path) as cache:
        write = cache.store.write
        monkeypatch.setattr(cache.store, "write", lambda *entry: turn.wait(120) and write(*entry))
        cache.features([key], [None], lambda rows: given)
        try:
            assert not list(tmp_path.rglob("*.safetensors"))
            found = cache.find(key)
        finally:
            turn.set()
    assert found is not None
    assert torch.equal(found.tensors["deep"], torch.ones(2, 2, 2).half())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_features_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    bad = EncoderFeatures(*[torch.full((1, 2, 2, 2), torch.nan)] * 3, None)
    with opened(tmp_path) as cache:
        made = cache.features(["cd" * 16], [None], lambda rows: bad)
    assert made.deep.isnan().all()
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("wrong", ["fewer arrays", "an unknown type", "another shape"])
def test_an_entry_that_no_encoder_gave_is_damage(tmp_path: Path, wrong: str) -> None:
    """Its checksum is right, as of one that another program wrote."""
    one = Stored("F64" if wrong == "an unknown type" else "F16", (2, 2, 2), np.zeros(16, np.uint8))
    if wrong == "another shape":
        one = replace(one, shape=(2, 2, 3))
    names = ("shallow", "middle", "deep")[: 2 if wrong == "fewer arrays" else 3]
    with opened(tmp_path) as cache:
        entry = Entry(dict.fromkeys(names, one), dict.fromkeys(names, "float32"))
        cache.store.write("ab" * 16, entry)
        assert cache.find("ab" * 16) is None
        assert cache.store.counts.damaged == 1


def test_the_key_is_of_pixels_and_shape(pictures: list[Path]) -> None:
    image = read_for_encoder(pictures[0], [sam_frame(64)]).rgb
    assert image_key(image) == image_key(image.copy())
    assert image_key(image) != image_key(image[::-1])
    assert image_key(image) != image_key(image.reshape(image.shape[1], image.shape[0], 3))
    assert image_key(image[:, ::-1]) == image_key(np.ascontiguousarray(image[:, ::-1]))


# --- commands -------------------------------------------------------------------------------------


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_predict_goes_by_the_cache_and_says_so(
    tmp_path: Path, pictures: list[Path], capfd: pytest.CaptureFixture[str], encoded: list[int]
) -> None:
    asked = ("predict", *pictures[:2], "-e", "the red circle", "--device", "cpu")
    kept = ("--feature-cache", tmp_path / "cache", "--feature-cache-limit", "1GB")
    assert run(*asked, *kept, "-o", tmp_path / "a") == 0
    assert run(*asked, *kept, "-o", tmp_path / "b") == 0
    assert encoded == [1, 1]
    told = capfd.readouterr().err
    assert "limit 1 GB" in told
    assert "2 images of this encoder are there" in told
    a, b = (tmp_path / name / "predictions.jsonl" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    report = json.loads((tmp_path / "b" / "run.json").read_text())
    assert report["feature_cache"]["read"] == 2
    assert report["settings"]["features"] == "half"
    # A run is of one kind from its beginning to its end.
    assert run(*asked, "-o", tmp_path / "a", "--resume") == 1
    assert "features" in capfd.readouterr().err


def test_eval_goes_by_the_cache_of_predict(
    tmp_path: Path, encoded: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "--dataset", "refshapes", "--split", "val", "--limit", "3", "--device", "cpu")
    kept = ("--feature-cache", tmp_path / "cache")
    for name in ("a", "b"):
        assert run(*asked, *kept, "-o", tmp_path / name) == 0
    made = len(encoded)
    assert made > 0
    rows = [(tmp_path / name / "per_expression.jsonl").read_bytes() for name in "ab"]
    assert rows[0] == rows[1]
    assert run(*asked, *kept, "--protocol", "lavt", "-o", tmp_path / "c") == 0
    assert len(encoded) == made
    capfd.readouterr()


@pytest.mark.parametrize("size", ["0", "much"])
def test_a_limit_that_is_no_size_is_wrong_usage(
    tmp_path: Path, size: str, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("predict", "x.png", "-e", "a", "-o", tmp_path / "o", "--feature-cache", tmp_path / "c")
    assert run(*asked, "--feature-cache-limit", size) == 2
    assert "is not a size; write it as 50GB" in capfd.readouterr().err
