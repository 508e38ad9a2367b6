"""CRIS and ReLA: their equations written out, and both through every command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.cli import Cli
from support.networks import (
    TEXTS,
    noise,
    randomize,
    relative_error,
    small_model,
    small_settings,
    streams,
)
from support.paths import REPO
from support.training_runs import RAW
from torch.nn import functional as F

from risam_cli.model.mask_decoder import CrossAttention, Decoded
from risam_cli.model.rivals.cris import CrisDecoder, CrisTaps, PixelAttention
from risam_cli.model.rivals.rela import RelaDecoder
from risam_cli.settings.load import check
from risam_cli.settings.model import ModelSettings
from risam_cli.training.losses import ReferringLoss

DIM, HEADS, GRID = 16, 2, (3, 5)
RIVALS = ("cris", "rela")


def _inputs(channels: int = DIM) -> dict[str, Any]:
    """Of four expressions over two images, the words of some padded."""
    regions = GRID[0] * GRID[1]
    return {
        "visual": noise(4, regions, channels, seed=1),
        "visual_position": noise(regions, DIM, seed=2),
        "words": noise(4, 5, DIM, seed=3),
        "valid": torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None],
        "sentence": noise(4, DIM, seed=4),
        "fine": None,
        "owner": torch.tensor([0, 1, 1, 0]),
        "grid": GRID,
    }


# --- CRIS -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_sentences_kernel_is_a_convolution_for_each_expression() -> None:
    """Section 3.4: the sentence's vector, as weight and bias of a 3x3 convolution."""
    decoder = randomize(CrisDecoder(DIM, HEADS, 1, 24)).eval()
    pixels, sentence = noise(3, DIM, *GRID), noise(3, DIM, seed=1)
    seen = []
    decoder.pixels.register_forward_hook(lambda _m, _i, output: seen.append(output))
    found = decoder.project(pixels, sentence)
    kernel = decoder.sentence_kernel(sentence)
    weight = kernel[:, :-1].reshape(3, DIM // 2, 3, 3)
    expected = F.conv2d(seen[0].flatten(0, 1)[None], weight, kernel[:, -1], padding=1, groups=3)
    assert found.shape == (3, 4 * GRID[0], 4 * GRID[1])
    assert relative_error(found, expected[0]) < 1e-5


@torch.no_grad()
def test_the_neck_lets_the_sentence_gate_the_deep_features_alone() -> None:
    neck = randomize(CrisDecoder(DIM, HEADS, 1, 24)).eval().neck
    taps = noise(2, 3 * DIM, *GRID)
    neck.sentence[1].weight.zero_()
    neck.sentence[1].bias.fill_(-9.0)  # a gate that is shut, whatever is said
    quiet = neck(taps, noise(2, DIM, seed=1))
    other = taps.clone()
    other[:, 2 * DIM :] = noise(2, DIM, *GRID, seed=2)
    assert torch.allclose(quiet, neck(other, noise(2, DIM, seed=3)), atol=1e-6)
    other[:, :DIM] += 1
    assert relative_error(neck(other, noise(2, DIM, seed=3)), quiet) > 0.01


@torch.no_grad()
def test_fused_attention_over_pixels_is_the_written_out_one() -> None:
    fused = randomize(PixelAttention(DIM, HEADS, downsample=1))
    plain = CrossAttention(DIM, HEADS, downsample=1)
    plain.load_state_dict(fused.state_dict())
    pixels = noise(2, 15, DIM)
    assert relative_error(fused(pixels, pixels, pixels), plain(pixels, pixels, pixels)) < 1e-5


def test_the_taps_keep_their_depths_apart() -> None:
    taps = randomize(CrisTaps(6, 5, DIM)).eval()
    shallow, middle, deep = (noise(2, c, 4, 4, seed=c) for c in (6, 6, 5))
    found = taps(shallow, middle, deep)
    assert found.shape == (2, 3 * DIM, 4, 4)
    moved = taps(shallow, middle, deep + 1)
    assert torch.equal(moved[:, : 2 * DIM], found[:, : 2 * DIM])
    assert not torch.equal(moved[:, 2 * DIM :], found[:, 2 * DIM :])


# --- ReLA -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_mask_is_the_sum_of_the_regions_masks_by_the_minimap() -> None:
    """Section 4.1: M = sum over regions n of x_n · (f_n · F_m)."""
    decoder = randomize(RelaDecoder(DIM, HEADS, 2, 24, 8, minimap=4)).eval()
    kept: dict[str, Any] = {}
    for name in ("norm", "up"):
        part = getattr(decoder, name)
        part.register_forward_hook(lambda _m, _i, output, name=name: kept.update({name: output}))
    found = decoder(*streams(**_inputs(), per_expression=True))
    share = decoder.minimap_head(kept["norm"])[..., 0].sigmoid()  # (E, 16)
    each = torch.einsum("enc,echw->enhw", decoder.filter_head(kept["norm"]), kept["up"])
    expected = (share[:, :, None, None] * each).sum(dim=1)
    assert relative_error(found.mask_logits, expected) < 1e-5
    assert found.minimap_logits.shape == (4, 4, 4)
    assert torch.allclose(found.minimap_logits.flatten(1).sigmoid(), share, atol=1e-6)
    pooled = decoder.no_target_head(kept["norm"].mean(dim=1))[:, 0]
    assert torch.allclose(found.no_target_logits, pooled)


def test_the_minimap_is_learned_from_the_masks_share_of_each_part() -> None:
    target = torch.zeros(2, 8, 8)
    target[0, :4, :2] = 1  # half of the upper left part of 2x2
    decoded = Decoded(torch.zeros(2, 8, 8), torch.zeros(2), torch.zeros(2), torch.zeros(2, 2, 2))
    valid, none = torch.ones(2, 8, 8), torch.tensor([0.0, 1.0])
    plain = ReferringLoss(1, 1, 1, 1, 0.0, 3.0)(decoded, target, valid, none)
    assert plain.minimap is not None
    assert float(plain.minimap) == pytest.approx(3 * math.log(2))
    logits = torch.full((2, 2, 2), -20.0)
    logits[0, 0, 0] = 0.0  # the logit of one half
    sure = Decoded(decoded.mask_logits, decoded.iou, decoded.no_target_logits, logits)
    best = ReferringLoss(1, 1, 1, 1, 0.0, 3.0)(sure, target, valid, none)
    assert float(best.minimap) == pytest.approx(3 * math.log(2) / 8, abs=1e-4)
    assert float(best.total - best.minimap) == pytest.approx(float(plain.total - plain.minimap))
    without = Decoded(decoded.mask_logits, decoded.iou, decoded.no_target_logits)
    assert ReferringLoss(1, 1, 1, 1, 0.0, 3.0)(without, target, valid, none).minimap is None


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", RIVALS)
@torch.no_grad()
def test_padded_words_have_no_part_in_the_answer(rival: str) -> None:
    cris = rival == "cris"
    decoder = CrisDecoder(DIM, HEADS, 2, 24) if cris else RelaDecoder(DIM, HEADS, 2, 24, 8)
    randomize(decoder).eval()
    inputs = _inputs(3 * DIM if cris else DIM)
    before = decoder(*streams(**inputs, per_expression=True)).mask_logits
    inputs["words"] = inputs["words"].clone()
    inputs["words"][~inputs["valid"]] = 1e4
    assert torch.equal(decoder(*streams(**inputs, per_expression=True)).mask_logits, before)
    inputs["words"][inputs["valid"]] += noise(int(inputs["valid"].sum()), DIM, seed=9)
    other = decoder(*streams(**inputs, per_expression=True)).mask_logits
    assert relative_error(other, before) > 1e-3


def test_the_encoders_of_all_kinds_have_the_same_weights() -> None:
    shapes = [
        {
            name: tensor.shape
            for name, tensor in small_model(kind=kind)[0].state_dict().items()
            if name.startswith(("image_encoder.", "text_encoder."))
        }
        for kind in ("risam", "sam", *RIVALS)
    ]
    assert all(other == shapes[0] for other in shapes)


@pytest.mark.parametrize(("old", "kind"), [("sam", "sam"), ("mutual_aware", "risam")])
def test_models_of_earlier_versions_name_their_kind_with_the_decoder(old: str, kind: str) -> None:
    stored = small_settings().model_dump(mode="json")
    del stored["kind"]
    stored["decoder"]["kind"] = old
    assert check(ModelSettings, stored, "an older folder") == small_settings(kind=kind)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_is_trained_predicted_with_evaluated_and_explained(
    rival: str, cli: Cli, tmp_path: Path
) -> None:
    fusion = {**RAW["stages"][1], "steps": 2}
    settings = {
        **RAW,
        "model": {**RAW["model"], "kind": rival},
        "stages": [fusion],
        "validate_every": 2,
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "rival.yaml").write_text(yaml.safe_dump(settings))
    done = cli("train", tmp_path / "rival.yaml")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(("minimap" in row) == (rival == "rela") for row in log if row["kind"] == "train")

    model = tmp_path / "run" / "best"
    image = REPO / "sample_data" / "images" / "crowded" / "scene_1.jpg"
    done = cli("predict", image, "-e", TEXTS[0], "--model", model, "-o", tmp_path / "predicted")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "predicted" / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert 0 <= json.loads(rows[0])["score"] <= 1

    what = ("--dataset", "refshapes", "--family", "grefshapes", "--split", "val", "--limit", "6")
    done = cli("eval", *what, "--model", model, "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report" / "report.json").read_text())

    done = cli("explain", image, "-e", TEXTS[0], "--model", model, "-o", tmp_path / "explained")
    assert done.returncode == 0, done.stderr
    assert "no Mutual-Aware Attention" in done.stderr
