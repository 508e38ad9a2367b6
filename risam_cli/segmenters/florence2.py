"""Florence-2 (Xiao et al. 2023, arXiv 2311.06242): trained for referring segmentation.

It writes its answer as polygons, token by token, and always writes one: it never says that nothing
fits. An answer's score is the mean probability of its tokens. Long polygons are cut at the token
limit, which the record then says.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from risam_cli.data.images.frames import Pixels
from risam_cli.errors import ModelError
from risam_cli.segmenters.published import (
    Folder,
    Published,
    load_tokenizer,
    load_weights,
    read_frame,
)
from risam_cli.segmenters.segmenter import Capabilities, Instances, Thresholds

_PROMPT = "Locate {} in the image with mask"  # <REFERRING_EXPRESSION_SEGMENTATION>
_BEAMS = 3  # as its documentation generates
_MOST_TOKENS = 1024  # of an answer
_HEAD_ROWS = 64  # tokens whose probabilities over the vocabulary are computed at a time


@dataclass(frozen=True, slots=True)
class PolygonMaps:
    """Instances as polygons; see :class:`risam_cli.segmenters.segmenter.Maps`.

    Attributes:
        parse: brings an answer to its instances' polygons at a size (W, H).
        instances: for each, the answer that it stands in and its number there.
    """

    parse: Any
    instances: Sequence[tuple[str, int]]
    device: torch.device

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, some: slice) -> PolygonMaps:
        return PolygonMaps(self.parse, self.instances[some], self.device)

    def logits(self, out: tuple[int, int]) -> Tensor:
        """(I, *out): infinite within the polygons, minus infinite outside."""
        height, width = out
        found = np.full((len(self.instances), height, width), -np.inf, np.float32)
        answers = {text: self.parse(text, (width, height)) for text, _ in self.instances}
        for row, (text, number) in zip(found, self.instances, strict=True):
            canvas = Image.new("1", (width, height))
            for polygon in answers[text][number]:
                ImageDraw.Draw(canvas).polygon(polygon, fill=1)
            row[np.asarray(canvas)] = np.inf
        return torch.from_numpy(found).to(self.device)

    def finite(self) -> Tensor:
        """Polygons are."""
        return torch.ones(len(self.instances), dtype=torch.bool, device=self.device)


class Florence2(Published):
    """See this module."""

    kind = "florence2"
    thresholds = Thresholds(mask=0.5, no_target=1.0)
    capabilities = Capabilities(instances=True)

    def __init__(self, folder: Folder, device: torch.device, precision: torch.dtype) -> None:
        from transformers import Florence2ForConditionalGeneration
        from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

        if "auto_map" in folder.config():
            raise ModelError(
                f"{folder.name} is Florence-2 as it was first published, with its own code, "
                "which would have to be run",
                "name florence-community/Florence-2-base-ft, or another of florence-community",
            )
        network = load_weights(Florence2ForConditionalGeneration, folder)
        words: Any = network.config.text_config
        tokenizer = load_tokenizer(folder, words.vocab_size)
        positions = int(words.max_position_embeddings)
        images = self._image_tokens(network, folder)
        room = positions - images - len(tokenizer(_PROMPT.format(""))["input_ids"])
        if room < 4:
            raise ModelError(
                f"{folder.name}: {positions} positions have no room for {images} image tokens",
                "download the folder again",
            )
        super().__init__(
            {"model": folder},
            (read_frame(folder, "stretch"),),
            network,
            tokenizer,
            room,
            device,
            precision,
        )
        tasks = (folder.json("processor_config.json") or {}).get("post_processor_config") or {}
        if "polygons" not in tasks:
            raise ModelError(
                f"{folder.name}: its processor_config.json has no post_processor_config for "
                "polygons",
                "download the folder again",
            )
        self._parser = Florence2PostProcessor(config=tasks, tokenizer=tokenizer)
        self._limit = min(_MOST_TOKENS, positions - 2)
        self._generation = deepcopy(network.generation_config)
        self._generation.update(
            max_new_tokens=self._limit, max_length=None, num_beams=_BEAMS, do_sample=False
        )

    @staticmethod
    def _image_tokens(network: Any, folder: Folder) -> int:
        frame = read_frame(folder, "stretch")
        with torch.inference_mode():
            blank = torch.zeros(1, 3, frame.height, frame.width)
            return int(network.get_image_features(blank).pooler_output.shape[1])

    def encode_image(self, inputs: Sequence[Pixels], row: int) -> Tensor:
        """Image tokens (1, N, D)."""
        pixels = inputs[0].values[row : row + 1].contiguous()
        tokens: Tensor = self._network.get_image_features(pixels).pooler_output
        return tokens

    def encode_text(self, text: str) -> tuple[Tensor, int, tuple[str, ...]]:
        """The prompt as embeddings (1, L, D)."""
        _, cut, unknown = self.tokens_of(text.strip(), add_special_tokens=False)
        if cut:
            words = self._tokenizer(text.strip(), add_special_tokens=False, verbose=False)
            text = self._tokenizer.decode(words["input_ids"][: self.max_tokens])
        start, end = self._tokenizer.bos_token, self._tokenizer.eos_token
        prompt = self._tokenizer(
            start + _PROMPT.format(text.strip()) + end,
            add_special_tokens=False,
            return_tensors="pt",
            verbose=False,
        ).to(self.device)
        return self._network.get_input_embeddings()(prompt["input_ids"]), cut, unknown

    def decode_image(
        self, image: Tensor, texts: Sequence[Tensor], size: tuple[int, int], threshold: float
    ) -> Instances:
        """All polygons of each answer; see :class:`Published`."""
        instances, counts, scores, nothing, notes = [], [], [], [], []
        for prompt in texts:
            ids, score = self._generate(image, prompt)
            text, _ = self._parser.decode_with_spans(ids)
            count = len(self._parse(text, (1000, 1000)))
            instances += [(text, k) for k in range(count)]
            counts.append(count)
            scores += [score] * count
            # An answer without a polygon is as sure as its tokens are.
            nothing.append(0.0 if count else score)
            cut = len(ids) >= self._limit
            notes.append((f"polygons cut at {self._limit} tokens",) if cut else ())
        maps = PolygonMaps(self._parse, instances, self.device)
        score_of, nothing_of = (
            torch.tensor(values, device=self.device) for values in (scores, nothing)
        )
        return Instances(maps, counts, score_of, nothing_of, notes)

    def _generate(self, image: Tensor, prompt: Tensor) -> tuple[list[int], float]:
        """The answer's token ids, without the decoder's first, and their mean probability."""
        from transformers.modeling_outputs import BaseModelOutput

        network = self._network
        with self.autocast():
            both = torch.cat([image.to(prompt.dtype), prompt], dim=1)
            mask = torch.ones(both.shape[:2], dtype=torch.long, device=both.device)
            read = network.model.language_model.encoder(inputs_embeds=both, attention_mask=mask)
            found = network.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.last_hidden_state),
                attention_mask=mask,
                generation_config=self._generation,
            )
            written = network.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.last_hidden_state),
                attention_mask=mask,
                decoder_input_ids=found[:, :-1],
                use_cache=False,
            ).last_hidden_state[0]
            total = 0.0
            for first in range(0, len(written), _HEAD_ROWS):
                part = slice(first, first + _HEAD_ROWS)
                likely = network.lm_head(written[part]).float().softmax(-1)
                taken = found[0, 1:][part, None]
                total += float(likely.gather(1, taken).sum())
        return found[0, 1:].tolist(), total / max(1, len(written))

    def _parse(self, text: str, size: tuple[int, int]) -> list[list[list[tuple[int, int]]]]:
        """Polygons of at least three corners, instance by instance, in pixels of (W, H)."""
        found = self._parser(text=text, image_size=size, parse_tasks=["polygons"])["polygons"]
        instances = []
        for one in found:
            polygons = [list(zip(p[::2], p[1::2], strict=False)) for p in one["polygons"]]
            polygons = [polygon for polygon in polygons if len(polygon) >= 3]
            if polygons:
                instances.append(polygons)
        return instances
