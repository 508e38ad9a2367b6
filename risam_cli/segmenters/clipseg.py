"""CLIPSeg (Lüddecke and Ecker 2022, arXiv 2112.10003): small, quick, and coarse at edges.

One map an expression on a grid of the input's size. Its scores are not calibrated: the score of an
answer is its map's highest probability.
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

THRESHOLDS = Thresholds(mask=0.3, no_target=0.7, calibrated=False)
"""Its authors evaluate at 0.3; where no pixel reaches that, nothing fits."""


class ClipSeg(Published):
    """See this module."""

    def __init__(self, folder: Folder, device: torch.device, precision: torch.dtype) -> None:
        from transformers import CLIPSegForImageSegmentation

        network = load_weights(CLIPSegForImageSegmentation, folder)
        words: Any = network.config.text_config
        super().__init__(
            "clipseg",
            {"model": folder},
            (read_frame(folder, "stretch"),),
            THRESHOLDS,
            Capabilities(),
            int(words.max_position_embeddings),
            device,
            precision,
        )
        self._tokenizer = load_tokenizer(folder, words.vocab_size)
        self._network: Any = network.to(device)

    def encode_images(self, inputs: Sequence[Pixels]) -> list[tuple[Tensor, ...]]:
        """The outputs of CLIP's layers that the decoder reads, image by image."""
        pixels = inputs[0].values.contiguous()
        layers = self._network.extract_layers
        found = []
        with self.autocast():
            for row in range(len(pixels)):
                seen = self._network.clip.get_image_features(
                    pixels[row : row + 1],
                    interpolate_pos_encoding=True,
                    output_hidden_states=True,
                )
                # The first of the hidden states is the embedding.
                found.append(tuple(seen.hidden_states[layer + 1] for layer in layers))
        return found

    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """CLIP's embeddings, (1, D) each."""
        tokens = [self.tokens_of(self._tokenizer, text) for text in texts]
        with self.autocast():
            features = [
                self._network.clip.get_text_features(
                    ids, attention_mask=torch.ones_like(ids)
                ).pooler_output
                for ids, _, _ in tokens
            ]
        return Texts(features, [cut for _, cut, _ in tokens], [odd for _, _, odd in tokens])

    def decode(
        self,
        features: list[tuple[Tensor, ...]],
        texts: Texts,
        rows: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        instance_threshold: float | None = None,
    ) -> list[Instances]:
        """See :class:`risam_cli.segmenters.segmenter.Segmenter`."""

        def decode(row: int, numbers: list[int]) -> Instances:
            with self.autocast():
                grids = [
                    self._network.decoder(features[row], texts.features[number]).logits
                    for number in numbers
                ]
            grid = torch.cat(grids).float()  # (e, h, w)
            best = grid.flatten(1).amax(1).sigmoid()
            maps = GridMaps(grid, self.frames[0], sizes[row])
            return Instances(maps, [1] * len(numbers), best, 1 - best)

        return by_image(rows, decode)


def load(folders: Sequence[Folder], device: torch.device, precision: torch.dtype) -> Segmenter:
    """Loads CLIPSeg from one folder.

    Raises:
        ModelError: files that are missing, damaged, or another model's.
    """
    return ClipSeg(folders[0], device, precision)
