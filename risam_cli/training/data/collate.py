"""Which examples a step takes, how they are dealt out, and how they become ragged batches."""

from __future__ import annotations

import atexit
import multiprocessing.util
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor

from risam_cli.inference.feature_cache import image_key
from risam_cli.interrupts import ignore_ends_of_group
from risam_cli.training.data.dataset import DenseExample, ReferringExample
from risam_cli.weights.tokenizer import TextTokenizer

# --- batches of tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferringBatch:
    """E expressions over B images.

    Attributes:
        images: (B, S, S, 3) uint8, zero-padded; fitted: (B, 2) height and width inside.
        image_index: (E,) image of each expression.
        input_ids, attention_mask: (E, L).
        targets: (E, T, T) uint8, 255 is full cover.
        no_target: (E,) float, 1 where nothing fits; weights: (E,) float, in the loss.
    """

    images: Tensor
    fitted: Tensor
    image_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    no_target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DenseBatch:
    """B scenes: images (B, S, S, 3) uint8 with (B, 2) height and width inside, labels
    (B, 3, t, t) uint8, centres (B, 2, t, t).
    """

    images: Tensor
    fitted: Tensor
    labels: Tensor
    centres: Tensor


class ReferringCollate:
    """Collates :class:`ReferringExample`; tokenizes in the worker, so that the loop does not.

    Args:
        tokenizer: of the text encoder; size: side S of the encoder's input.
    """

    def __init__(self, tokenizer: TextTokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size

    def __call__(self, examples: Sequence[ReferringExample]) -> ReferringBatch:
        """Makes one ragged batch of B examples."""
        images = torch.zeros(len(examples), self.size, self.size, 3, dtype=torch.uint8)
        for row, example in zip(images, examples, strict=True):
            height, width = example.image.shape[:2]
            row[:height, :width] = torch.from_numpy(example.image)
        tokens = self.tokenizer.encode([text for e in examples for text in e.texts])
        counts = torch.tensor([len(e.texts) for e in examples])
        return ReferringBatch(
            images=images,
            fitted=torch.tensor([e.image.shape[:2] for e in examples]),
            image_index=torch.repeat_interleave(torch.arange(len(examples)), counts),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            targets=torch.cat([torch.from_numpy(e.targets) for e in examples]),
            no_target=torch.cat([torch.from_numpy(e.no_target) for e in examples]).float(),
            weights=torch.cat([torch.from_numpy(e.weights) for e in examples]),
        )


@dataclass(frozen=True)
class KeyedBatch(ReferringBatch):
    """A batch with each image's key; see :func:`risam_cli.inference.feature_cache.image_key`."""

    keys: tuple[str, ...] = ()


class KeyedCollate(ReferringCollate):
    """As its base, with the images' keys: hashed in the worker, so that the loop does not."""

    def __call__(self, examples: Sequence[ReferringExample]) -> KeyedBatch:
        """Makes one ragged batch of B examples."""
        batch = super().__call__(examples)
        return KeyedBatch(**vars(batch), keys=tuple(image_key(one.image) for one in examples))


def collate_dense(examples: Sequence[DenseExample]) -> DenseBatch:
    """Stacks :class:`DenseExample`."""
    return DenseBatch(
        images=torch.stack([torch.from_numpy(e.image) for e in examples]),
        fitted=torch.tensor([e.fitted for e in examples]),
        labels=torch.stack([torch.from_numpy(e.labels) for e in examples]),
        centres=torch.stack([torch.from_numpy(e.centres) for e in examples]),
    )


# --- which images a step takes --------------------------------------------------------------------


@dataclass(eq=False)
class PlannedBatches:
    """Batches of dataset indices for the steps of a stage: a pure function of seed and step.

    Every epoch is its own permutation, and epochs run on without a short batch between, so
    that a resumed run sees the very batches that an unbroken one would have seen.

    Args:
        items: length of the data set; batch: indices of a step; first, last: steps [first, last).

    Index i in epoch k is given as k·items + i, for data that draws changes anew in each epoch.
    """

    items: int
    batch: int
    first: int
    last: int
    seed: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first, self.last):
            chosen = []
            for place in range(step * self.batch, (step + 1) * self.batch):
                if place // self.items != epoch:
                    epoch = place // self.items
                    generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
                    order = torch.randperm(self.items, generator=generator)
                chosen.append(epoch * self.items + int(order[place % self.items]))
            yield chosen


@dataclass(eq=False)
class DealtBatches:
    """One process's parts of planned batches, one after the other, for a loader.

    The batch of a step is the same however many processes share it; each takes the same number
    of images (but for a remainder), dealt so that the expressions are even too.

    Args:
        planned: batches of the whole run.
        rank, world: this process of how many; parts: how many parts it puts its images in.
        size: expressions of an index; by default all are equal.
    """

    planned: PlannedBatches
    rank: int = 0
    world: int = 1
    parts: int = 1
    size: Callable[[int], int] = lambda index: 1

    def of(self, chosen: Sequence[int], rank: int | None = None) -> list[list[int]]:
        """The parts of a step's batch that a process (by default this one) takes."""
        hand = deal(chosen, self.world, self.size)[self.rank if rank is None else rank]
        return [part for part in deal(hand, self.parts, self.size) if part]

    def per_step(self, images: int) -> int:
        """How many parts this process has in every step of ``images``."""
        hands = deal(range(images), self.world, lambda index: 1)
        return min(self.parts, len(hands[self.rank]))

    def __len__(self) -> int:
        return len(self.planned) * self.per_step(self.planned.batch)

    def __iter__(self) -> Iterator[list[int]]:
        for chosen in self.planned:
            yield from self.of(chosen)


def deal(items: Sequence[int], hands: int, size: Callable[[int], int]) -> list[list[int]]:
    """Deals items into hands of equal number (the first ones have the remainder), sizes even.

    The largest go first, each to the hand that holds least and has room. A pure function, so that
    every process knows the hands of all; within a hand the items keep their order.
    """
    if hands == 1:
        return [list(items)]
    least, more = divmod(len(items), hands)
    room = [least + (hand < more) for hand in range(hands)]
    held: list[list[int]] = [[] for _ in range(hands)]
    load = [0] * hands
    sizes = [size(item) for item in items]
    for place in sorted(range(len(items)), key=lambda place: -sizes[place]):
        hand = min((h for h in range(hands) if len(held[h]) < room[h]), key=lambda h: load[h])
        held[hand].append(place)
        load[hand] += sizes[place]
    return [[items[place] for place in sorted(places)] for places in held]


def begin_worker(number: int) -> None:
    """Leaves signals to the main process, which ends the workers, and cores to the network."""
    ignore_ends_of_group()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)


def _end_workers() -> None:
    """Ends workers that are left when the process ends, as after an error with a loader at work.

    They ignore SIGTERM, so multiprocessing, which sends that and waits, would wait for ever.
    """
    for worker in multiprocessing.active_children():
        worker.kill()


# After multiprocessing.util was imported, so that it is called before that one's own.
atexit.register(_end_workers)
