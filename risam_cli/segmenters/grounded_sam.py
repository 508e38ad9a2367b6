"""Grounding DINO or MM-Grounding-DINO for boxes, then SAM, SAM-HQ or SAM 2 for their masks.

Boxes of an expression are scored by the mean probability of its tokens (ours): the maximum over
tokens, which a detector of class names goes by, is that of a single word. Where instances are told
one by one, a box that a better one nearly covers is left out, as the demo of Grounded-SAM (Ren et
al. 2024, arXiv 2401.14159) does by non-maximum suppression. SAM's and SAM-HQ's image encoder is the
project's own, which is several times as fast, wherever its weights fit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from risam_cli.data.images.frames import Frame, Pixels
from risam_cli.errors import ModelError
from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.segmenters.published import (
    Folder,
    Published,
    load_tokenizer,
    load_weights,
    read_frame,
)
from risam_cli.segmenters.segmenter import Capabilities, GridMaps, Instances, Thresholds
from risam_cli.weights.sam import ENCODER, from_hugging_face

_BOXES = 16  # that go through SAM at a time
_SAME = 0.8  # IoU of two boxes over which they are one object's, as in Grounded-SAM's demo
_ENDS = (".", "?")  # at which a prompt would fall apart into several


class Sam:
    """SAM or SAM-HQ."""

    def __init__(self, network: Any, frame: Frame, device: torch.device) -> None:
        self.frame = frame
        self._hq = network.config.model_type == "sam_hq"
        own = fast_encoder(network)
        if own is not None:
            network.vision_encoder = nn.Identity()
            own.to(device).eval().requires_grad_(False)
            prepare_for_inference(own, device)
        self._own = own
        self._network: Any = network.to(device)

    def encode(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of one image, (1, 3, h, w).

        Returns:
            Embeddings (1, C, h, w), and for SAM-HQ the first global block's output (1, h, w, D).
        """
        if self._own is not None:
            found = self._own(pixels)
            return found.deep, [found.shallow.permute(0, 2, 3, 1)]
        if self._hq:
            embeddings, between = self._network.get_image_embeddings(pixels.contiguous())
            return embeddings, between[:1]
        return self._network.get_image_embeddings(pixels.contiguous()), []

    def masks(self, features: tuple[Tensor, list[Tensor]], boxes: Tensor) -> Tensor:
        """Mask logits (I, h, w) over the frame of boxes (I, 4), corners in pixels of the frame."""
        embeddings, between = features
        more = {"intermediate_embeddings": between} if self._hq else {}
        found = self._network(
            image_embeddings=embeddings, input_boxes=boxes[None], multimask_output=False, **more
        )
        return found.pred_masks[0, :, 0]


class Sam2:
    """SAM 2."""

    def __init__(self, network: Any, frame: Frame, device: torch.device) -> None:
        self.frame = frame
        self._network: Any = network.to(device)

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Embeddings at three resolutions."""
        found: list[Tensor] = self._network.get_image_embeddings(pixels.contiguous())
        return found

    def masks(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """See :class:`Sam`."""
        found = self._network(
            image_embeddings=list(features), input_boxes=boxes[None], multimask_output=False
        )
        return found.pred_masks[0, :, 0]


def fast_encoder(network: Any) -> ImageEncoder | None:
    """The project's own encoder with a SAM network's weights; None where they do not fit it."""
    vision = network.config.vision_config
    globals_ = list(vision.global_attn_indexes or [])
    depth = int(vision.num_hidden_layers)
    usual = (
        vision.hidden_act == "gelu"
        and vision.layer_norm_eps == 1e-6
        and vision.qkv_bias
        and vision.use_abs_pos
        and vision.use_rel_pos
        and vision.num_channels == 3
        and bool(globals_)
        and globals_[0] < depth - 2
    )
    if not usual:
        return None
    # SAM-HQ's decoder looks at the first global block's output.
    with torch.device("meta"):
        encoder = ImageEncoder(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            dim=vision.hidden_size,
            depth=depth,
            heads=vision.num_attention_heads,
            mlp_ratio=(vision.mlp_dim + 0.5) / vision.hidden_size,  # it is rounded down
            out_dim=vision.output_channels,
            window=vision.window_size,
            global_blocks=globals_,
            taps=(globals_[0], depth - 2, depth - 1),
            adapter_dim=0,
            stem=None,
        )
    theirs = {f"vision_encoder.{k}": v for k, v in network.vision_encoder.state_dict().items()}
    weights = {k.removeprefix(ENCODER): v for k, v in from_hugging_face(theirs).items()}
    own = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in weights.items()}:
        return None
    encoder.load_state_dict(weights, assign=True)
    return encoder


class Remembered(nn.Module):
    """A detector's backbone that gives what it gave before, within :meth:`recall`.

    What it recalls belongs to the caller and is told apart by thread: several images may be in the
    network at a time.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self._recalled = threading.local()

    @contextmanager
    def recall(self, seen: Sequence[Any]) -> Iterator[None]:
        """Within it the calling thread's forward gives ``seen``."""
        self._recalled.seen = seen
        try:
            yield
        finally:
            self._recalled.seen = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[Any]:
        """As the backbone: pairs of a feature map and its mask."""
        seen = getattr(self._recalled, "seen", None)
        return list(self.backbone(pixel_values, pixel_mask) if seen is None else seen)


@dataclass(frozen=True, slots=True)
class _Image:
    """Features of one image: the detector's input and backbone outputs, and SAM's."""

    pixels: Tensor
    mask: Tensor
    seen: Any
    sam: Any


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Tokens of one expression; ``own`` are the numbers of those that are words of it."""

    tokens: dict[str, Tensor]
    own: Tensor


class GroundedSam(Published):
    """See this module."""

    kind = "grounded-sam"
    # Instances as Grounding DINO's documentation has them.
    thresholds = Thresholds(mask=0.5, no_target=1.0, instance=0.25)
    capabilities = Capabilities(instances=True)

    def __init__(
        self,
        detector: Folder,
        segmenter: Folder,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        import transformers

        kind = str(detector.config().get("model_type"))
        mm = kind == "mm-grounding-dino"
        network = load_weights(
            transformers.MMGroundingDinoForObjectDetection
            if mm
            else transformers.GroundingDinoForObjectDetection,
            detector,
        )
        words: Any = network.config.text_config
        self._boxes = _box_segmenter(segmenter, device)
        self._seen = Remembered(network.model.backbone.conv_encoder)
        network.model.backbone.conv_encoder = self._seen
        super().__init__(
            {"detector": detector, "segmenter": segmenter},
            (read_frame(detector, "shortest"), self._boxes.frame),
            network,
            load_tokenizer(detector, words.vocab_size),
            int(network.config.max_text_len),
            device,
            precision,
        )

    def encode_image(self, inputs: Sequence[Pixels], row: int) -> _Image:
        """What the detector's backbone and SAM's encoder give."""
        height, width = inputs[0].sizes[row]
        pixels = inputs[0].values[row : row + 1, :, :height, :width].contiguous()
        mask = torch.ones(1, height, width, dtype=torch.long, device=self.device)
        view = inputs[1].values[row : row + 1]
        return _Image(pixels, mask, self._seen(pixels, mask), self._boxes.encode(view))

    def encode_text(self, text: str) -> tuple[_Prompt, int, tuple[str, ...]]:
        """Token ids; the detector mixes words and image from its first layers on."""
        # Lower case with a full stop, as it was trained; none within, where it would fall apart
        # into two.
        words = text.lower()
        for end in _ENDS:
            words = words.replace(end, " ")
        words = " ".join(words.split())
        ids, cut, unknown = self.tokens_of(words, add_special_tokens=False)
        room = self.max_tokens - 3
        own = ids[0, :room].tolist()
        stop, first, last = (
            self._tokenizer.convert_tokens_to_ids(t)
            for t in (".", self._tokenizer.cls_token, self._tokenizer.sep_token)
        )
        tokens = torch.tensor([[first, *own, stop, last]], device=self.device)
        prompt = _Prompt(
            {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "token_type_ids": torch.zeros_like(tokens),
            },
            torch.arange(1, 1 + len(own), device=self.device),
        )
        return prompt, self.max_tokens if cut or ids.shape[1] > room else 0, unknown

    def decode_image(
        self, image: _Image, texts: Sequence[_Prompt], size: tuple[int, int], threshold: float
    ) -> Instances:
        """The boxes above the threshold, those that repeat another last; see :class:`Published`."""
        grids, scores, nothing, distinct = [], [], [], []
        for prompt in texts:
            with self.autocast():
                boxes, score, most = self._detect(image, prompt, threshold)
                order, count = distinct_first(boxes)
                boxes, score = boxes[order], score[order]
                distinct.append(count)
                grids.append(self._masks(image, boxes, size))
            scores.append(score)
            nothing.append(1 - most)
        maps = GridMaps(torch.cat(grids), self._boxes.frame, size)
        counts = [len(score) for score in scores]
        return Instances(maps, counts, torch.cat(scores), torch.stack(nothing), distinct=distinct)

    def _detect(
        self, image: _Image, prompt: _Prompt, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Corners (I, 4) in 0..1 and scores (I,) above the threshold, best first; the best."""
        with self._seen.recall(image.seen):
            found = self._network(pixel_values=image.pixels, pixel_mask=image.mask, **prompt.tokens)
        likely = found.logits[0].float().sigmoid()  # (queries, tokens)
        scores = likely[:, prompt.own].mean(1) if len(prompt.own) else likely[:, 0] * 0
        kept = (scores > threshold).nonzero().flatten()
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        x, y, width, height = found.pred_boxes[0, kept].float().unbind(1)
        sides = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        return torch.stack(sides, dim=1), scores[kept], scores.max()

    def _masks(self, image: _Image, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """(I, h, w) over SAM's frame."""
        corners = self._boxes.frame.boxes_to_frame(boxes, size)
        parts = [
            self._boxes.masks(image.sam, corners[first : first + _BOXES]).float()
            for first in range(0, len(corners), _BOXES)
        ]
        return torch.cat(parts) if parts else boxes.new_zeros((0, 1, 1))


def distinct_first(boxes: Tensor) -> tuple[list[int], int]:
    """Numbers of boxes (I, 4), corners, best first: those that no kept better one nearly covers,
    then the others; and how many the former are.
    """
    low, high = boxes[:, None, :2].maximum(boxes[:, :2]), boxes[:, None, 2:].minimum(boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    same = (shared > _SAME * (area[:, None] + area - shared)).cpu()
    kept: list[int] = []
    repeats: list[int] = []
    for number in range(len(boxes)):
        (repeats if same[number, kept].any() else kept).append(number)
    return kept + repeats, len(kept)


def _box_segmenter(folder: Folder, device: torch.device) -> Sam | Sam2:
    """SAM, SAM-HQ or SAM 2, by the folder's config."""
    import transformers

    kind = str(folder.config().get("model_type"))
    if kind in ("sam", "sam_hq"):
        network = load_weights(
            transformers.SamModel if kind == "sam" else transformers.SamHQModel, folder
        )
        return Sam(network, read_frame(folder, "pad"), device)
    if kind in ("sam2", "sam2_video"):
        network = load_weights(transformers.Sam2Model, folder)  # which leaves a video's parts out
        return Sam2(network, read_frame(folder, "stretch"), device)
    raise ModelError(
        f"{folder.name} is a {kind!r}, which cannot make masks from boxes",
        "give a SAM, SAM-HQ or SAM 2 as the second part",
    )
