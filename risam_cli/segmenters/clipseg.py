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
    load_tokenizer,
    load_weights,
    read_frame,
)
from risam_cli.segmenters.segmenter import Capabilities, GridMaps, Instances, Thresholds


class ClipSeg(Published):
    """See this module."""

    kind = "clipseg"
    # Its authors evaluate at 0.3; where no pixel reaches that, nothing fits.
    thresholds = Thresholds(mask=0.3, no_target=0.7, calibrated=False)
    capabilities = Capabilities()

    def __init__(self, folder: Folder, device: torch.device, precision: torch.dtype) -> None:
        from transformers import CLIPSegForImageSegmentation

        network = load_weights(CLIPSegForImageSegmentation, folder)
        words: Any = network.config.text_config
        super().__init__(
            {"model": folder},
            (read_frame(folder, "stretch"),),
            network,
            load_tokenizer(folder, words.vocab_size),
            int(words.max_position_embeddings),
            device,
            precision,
        )

    def encode_image(self, inputs: Sequence[Pixels], row: int) -> tuple[Tensor, ...]:
        """The outputs of CLIP's layers that the decoder reads."""
        seen = self._network.clip.get_image_features(
            inputs[0].values[row : row + 1].contiguous(),
            interpolate_pos_encoding=True,
            output_hidden_states=True,
        )
        # The first of the hidden states is the embedding.
        return tuple(seen.hidden_states[layer + 1] for layer in self._network.extract_layers)

    def encode_text(self, text: str) -> tuple[Tensor, int, tuple[str, ...]]:
        """CLIP's embedding, (1, D)."""
        ids, cut, unknown = self.tokens_of(text)
        with self.autocast():
            found = self._network.clip.get_text_features(ids, attention_mask=torch.ones_like(ids))
        return found.pooler_output, cut, unknown

    def decode_image(
        self,
        image: tuple[Tensor, ...],
        texts: Sequence[Tensor],
        size: tuple[int, int],
        threshold: float,
    ) -> Instances:
        """One map an expression; see :class:`Published`."""
        with self.autocast():
            grids = [self._network.decoder(image, text).logits for text in texts]
        grid = torch.cat(grids).float()  # (e, h, w)
        best = grid.flatten(1).amax(1).sigmoid()
        maps = GridMaps(grid, self.frames[0], size)
        return Instances(maps, [1] * len(texts), best, 1 - best)
