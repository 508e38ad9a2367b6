"""One image, encoded once and asked again and again: for a notebook, and for ``risam explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from risam_cli.data.images.images import EncoderImage
from risam_cli.errors import ModelError
from risam_cli.inference.compute import Compute
from risam_cli.inference.cores import threads_of
from risam_cli.inference.device import is_out_of_memory
from risam_cli.inference.finish import Finishers, ImageResult
from risam_cli.inference.jobs import Job
from risam_cli.inference.loader import Loaded
from risam_cli.model.mutual_aware_attention import AttentionMaps
from risam_cli.model.risam import ImageFeatures
from risam_cli.types import Sample


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image with its features, on the device."""

    image: EncoderImage
    features: ImageFeatures


class Session(Compute):
    """Runs a model step by step, with the arithmetic of a whole run."""

    def encode(self, image: EncoderImage) -> Encoded:
        """Encodes one image.

        Raises:
            ModelError: the network failed on it.
        """
        try:
            with threads_of(self.settings.cores.threads):
                return Encoded(image, self._encode([Job(image, ())]))
        except Exception as error:
            raise _explained(error) from error

    def ask(self, encoded: Encoded, sample: Sample, bar: float) -> ImageResult:
        """The result for a sample whose image was encoded before, as a whole run gives it.

        Args:
            bar: probability of "nothing fits" above which the mask is emptied.
        """
        texts = [expression.text for expression in sample.expressions]
        with (
            threads_of(self.settings.cores.threads),
            Finishers[None](bar, False, None) as finishers,
        ):
            finishers.begin(0, sample, None, Loaded(encoded.image, "", None, 0.0))
            job = Job(encoded.image, texts, [len(texts)])
            for answer in self._decode_all(encoded.features, [(0, job)]):
                finishers.finish(0, answer.text, answer)
            finishers.computed([0])
            finishers.end(None)
            return next(finishers.results())[1]

    @torch.inference_mode()
    def attention(self, encoded: Encoded, texts: Sequence[str]) -> list[AttentionMaps]:
        """The two attention maps of every block for E expressions; see :class:`AttentionMaps`.

        Returns:
            One entry a block; none where the model has no Mutual-Aware Attention.

        Raises:
            ModelError: the network failed on them.
        """
        rows = torch.zeros(len(texts), dtype=torch.long, device=self.settings.device)
        try:
            with threads_of(self.settings.cores.threads), self._autocast():
                features = self._text_features(tuple(texts)).features
                return self.loaded.model.attention_maps(encoded.features, features, rows)
        except Exception as error:
            raise _explained(error) from error


def _explained(error: Exception) -> ModelError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    fix = "take a smaller model or --device cpu" if is_out_of_memory(error) else ""
    return ModelError(f"the network failed: {text}", fix)
