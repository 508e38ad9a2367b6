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
    load_tokenizer,
    load_weights,
    read_frame,
)
from risam_cli.segmenters.segmenter import Capabilities, GridMaps, Instances, Thresholds

_MAX_TOKENS = 32  # that its processor pads to


class Sam3(Published):
    """See this module."""

    kind = "sam3"
    thresholds = Thresholds(mask=0.5, no_target=1.0, instance=0.5)  # as its documentation has them
    capabilities = Capabilities(instances=True)

    def __init__(self, folder: Folder, device: torch.device, precision: torch.dtype) -> None:
        from transformers import Sam3Model

        # A sam3_video folder holds the detector beside a tracker, which the class leaves out.
        network = load_weights(Sam3Model, folder)
        words: Any = network.config.text_config
        super().__init__(
            {"model": folder},
            (read_frame(folder, "stretch"),),
            network,
            load_tokenizer(folder, words.vocab_size),
            min(_MAX_TOKENS, int(words.max_position_embeddings)),
            device,
            precision,
        )

    def encode_image(self, inputs: Sequence[Pixels], row: int) -> Any:
        """What the vision encoder gives."""
        return self._network.get_vision_features(inputs[0].values[row : row + 1].contiguous())

    def encode_text(self, text: str) -> tuple[tuple[Any, Tensor], int, tuple[str, ...]]:
        """Text features with their attention mask, padded as the processor pads them."""
        _, cut, unknown = self.tokens_of(text)
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
        return (found, mask), cut, unknown

    def decode_image(
        self,
        image: Any,
        texts: Sequence[tuple[Any, Tensor]],
        size: tuple[int, int],
        threshold: float,
    ) -> Instances:
        """The instances above the threshold, best first; see :class:`Published`."""
        grids, scores, nothing = [], [], []
        for words, mask in texts:
            with self.autocast():
                found = self._network(vision_embeds=image, text_embeds=words, attention_mask=mask)
            grid, score, most = _kept(found, threshold)
            grids.append(grid)
            scores.append(score)
            nothing.append(1 - most)
        maps = GridMaps(torch.cat(grids), self.frames[0], size)
        counts = [len(score) for score in scores]
        return Instances(maps, counts, torch.cat(scores), torch.stack(nothing))


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
