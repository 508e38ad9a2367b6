"""Small models, images and explanations that the tests of ``risam explain`` share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.memory import memory_for_encoder
from risam_cli.explain.attention import Attention, explain
from risam_cli.explain.explanation import Explained, Explanation
from risam_cli.inference.compute import ComputeSettings
from risam_cli.inference.pipeline import Session
from risam_cli.masks import rle as masks
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.types import Prediction
from support.networks import small_model

TEXT = "the small blue square left of the wobbly star"


def small_loaded(**changes: Any) -> Any:
    """What is needed of a loaded model: two blocks of two heads over 4 x 4 regions."""
    model, tokenizer = small_model(**changes)
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        image_size=64,
        threshold=0.5,
        no_target_threshold=0.5,
        name="small",
        hash="0" * 64,
    )


def session_of(loaded: Any) -> Session:
    segmenter = RisamSegmenter(loaded, torch.device("cpu"), torch.float32)
    return Session(segmenter, ComputeSettings(torch.device("cpu"), 0.5, 1))


def noise_image(height: int = 30, width: int = 60) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def attention_of(loaded: Any, image: np.ndarray[Any, Any], text: str = TEXT) -> Attention:
    session = session_of(loaded)
    encoded = session.encode(memory_for_encoder(image, [sam_frame(64)], "it"))
    return explain(session, loaded.tokenizer, encoded, text)


def explanation_of(*attention: Attention, **more: Any) -> Explanation:
    image = noise_image()
    mask = np.zeros((30, 60), np.bool_)
    mask[5:20, 10:30] = True
    rle = masks.encode(mask)
    explained = tuple(
        Explained(
            Prediction("0", "a.png", one.expression, 30, 60, rle, (0, 0, 1, 1), 300, 0.5, False),
            one,
        )
        for one in attention
    )
    return Explanation("a.png", image, "small", "0" * 64, "cpu", explained, **more)
