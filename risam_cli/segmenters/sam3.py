"""SAM 3 (Meta, 2025) asked by text: every instance of a noun phrase, with the best masks.

It knows concepts, not references: "the left dog" gives every dog. An instance's score is its class
probability times the probability that the concept is present at all. Preparation of images is by
hand, since its processor needs torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from risam_cli.data.images.frames import Pixels
from risam_cli.segmenters.published import (
    Folder,
    Published,
    by_image,
    load_tokenizer,
    load_weights,
    read_frame,
)
from risam_cli.segmenters.segmenter import (
    Capabilities,
    GridMaps,
    Instances,
    Segmenter,
    Texts,
    Thresholds,
)

THRESHOLDS = Thresholds(mask=0.5, no_target=1.0, instance=0.5)
"""As its documentation has them."""

_MAX_TOKENS = 32  # that its processor pads to


class Sam3(Published):
    """See this module."""

    def __init__(self, folder: Folder, device: torch.device, precision: torch.dtype) -> None:
        from transformers import Sam3Model

        # A sam3_video folder holds the detector beside a tracker, which the class leaves out.
        network = load_weights(Sam3Model, folder)
        words: Any = network.config.text_config
        super().__init__(
            "sam3",
            {"model": folder},
            (read_frame(folder, "stretch"),),
            THRESHOLDS,
            Capabilities(instances=True),
            min(_MAX_TOKENS, int(words.max_position_embeddings)),
            device,
            precision,
        )
        self._tokenizer = load_tokenizer(folder, words.vocab_size)
        self._network: Any = network.to(device)

    def encode_images(self, inputs: Sequence[Pixels]) -> list[Any]:
        """What the vision encoder gives, image by image."""
        pixels = inputs[0].values.contiguous()
        with self.autocast():
            return [
                self._network.get_vision_features(pixels[row : row + 1])
                for row in range(len(pixels))
            ]

    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """Text features with their attention masks, padded as the processor pads them."""
        features, cut_to, unknown = [], [], []
        for text in texts:
            _, cut, odd = self.tokens_of(self._tokenizer, text)
            padded = self._tokenizer(
                text[: 40 * self.max_tokens],
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            mask = padded["attention_mask"]
            with self.autocast():
                found = self._network.get_text_features(padded["input_ids"], attention_mask=mask)
            features.append((found, mask))
            cut_to.append(cut)
            unknown.append(odd)
        return Texts(features, cut_to, unknown)

    def decode(
        self,
        features: list[Any],
        texts: Texts,
        rows: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        instance_threshold: float | None = None,
    ) -> list[Instances]:
        """See :class:`risam_cli.segmenters.segmenter.Segmenter`."""
        threshold = THRESHOLDS.instance if instance_threshold is None else instance_threshold

        def decode(row: int, numbers: list[int]) -> Instances:
            grids, scores, nothing = [], [], []
            for number in numbers:
                words, mask = texts.features[number]
                with self.autocast():
                    found = self._network(
                        vision_embeds=features[row], text_embeds=words, attention_mask=mask
                    )
                grid, score, most = _kept(found, threshold or 0.0)
                grids.append(grid)
                scores.append(score)
                nothing.append(1 - most)
            maps = GridMaps(torch.cat(grids), self.frames[0], sizes[row])
            counts = [len(score) for score in scores]
            return Instances(maps, counts, torch.cat(scores), torch.stack(nothing))

        return by_image(rows, decode)


def _kept(found: Any, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits (I, h, w) and scores (I,) of the instances above the threshold, best first; the
    best score of all.
    """
    scores = found.pred_logits[0].float().sigmoid()
    if found.presence_logits is not None:
        scores = scores * found.presence_logits[0].float().sigmoid()
    kept = (scores > threshold).nonzero().flatten()
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return found.pred_masks[0, kept].float(), scores[kept], scores.max()


def load(folders: Sequence[Folder], device: torch.device, precision: torch.dtype) -> Segmenter:
    """Loads SAM 3 from one folder.

    Raises:
        ModelError: files that are missing, damaged, or another model's.
    """
    return Sam3(folders[0], device, precision)
