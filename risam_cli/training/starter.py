"""A YAML file to train on one's own data with, out of what is found in them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from risam_cli.console.text import counted, sanitize
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.held_out import coco_splits, is_held_out
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import DataError, setting
from risam_cli.settings.load import check
from risam_cli.settings.train import TrainSettings, complete
from risam_cli.weights import folder as model_folders
from risam_cli.weights.tokenizer import KnownWords, TextTokenizer, load_tokenizer

_EPOCHS = 30
_FEWEST, _MOST = 100, 4000  # steps
_IMAGES = 8  # of a step

_TEMPLATE = """\
# Trains on {annotations}: {facts}.
#
{usage}name: {name}
seed: 0
output: {output}
workers: 1

# It starts from the bundled model, which knows coloured shapes and no photos{words}.
init_from: {start}
model:
  text_encoder: {{learn_words: true}} # adds words of `train` that the model does not know
# For photos, with a GPU: SAM and a pretrained text encoder in place of the two settings above,
# and train_encoder: adapters in the stage below.
# model:
#   preset: vit_b
#   image_encoder: {{checkpoint: weights/sam_vit_b_01ec64.pth, adapter_dim: 64}}
#   text_encoder: {{source: auto, lora: {{rank: 16, alpha: 32}}}} # BERT, or learned words
#   fusion: {{identity_start: language, vision_guided_reads: both}}
#   decoder: {{no_target_evidence: true}}

train:
  dataset: coco
  annotations: {annotations_yaml}
{images}{train_part}val:
  mine: {val_part}
augment: {{flip: 0.5, crop: 0.3, crop_least: 0.7}} # never where an expression would become untrue

stages:
  - name: tune
    kind: referring
    steps: {steps} # about {epochs} times through the images
    images_per_step: {images_per_step}
    learning_rate: 2.0e-4
    warmup: {warmup}
loss: {{mask: 5.0, dice: 1.0, no_target: 0.5, iou: 0.2, target_size: 128}}
optimizer: {{ema_decay: 0.98}}

# What best/ is chosen by: a figure of `risam eval`. miou counts a right "nothing" as 1.
best_by: miou
validate_every: {every}
checkpoint_every: {every}
log_every: 10
"""


def starter_file(annotations: Path, images: Path | None, file: Path, usage: str) -> str:
    """The text of a commented YAML file that ``risam train`` takes as it is.

    Args:
        annotations: COCO-style JSON; images: where its file names start, None for beside it.
        file: where the text will be; the run has its name.
        usage: comment lines on how to use it, with places for ``file`` and ``output``.

    Raises:
        DataError: the file cannot be read, or has no expressions, or its images are not there.
    """
    source = open_coco(annotations, images)
    count = len(source.groups)
    if not count:
        raise DataError(
            f"{annotations} holds no expressions",
            "add a list 'expressions' to the file, as docs/formats.md shows",
        )
    missing = [group.path for group in source.groups if not group.path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {count} images are missing, first {missing[0]}",
            f"give their folder by {setting('images', 'DIR')}",
        )
    facts, words = _facts(source)
    train_part, val_part, in_training = _parts(annotations, images, count)
    images_per_step = min(_IMAGES, in_training)
    steps = min(_MOST, max(_FEWEST, _EPOCHS * in_training // images_per_step))
    quoted = json.dumps(str(annotations), ensure_ascii=False)
    folder = "" if images is None else f"  images: {json.dumps(str(images), ensure_ascii=False)}\n"
    name = re.sub(r"[^\w.-]+", "_", file.stem) or "run"
    text = _TEMPLATE.format(
        usage=usage.format(file=sanitize(shlex.quote(str(file))), output=f"runs/{name}"),
        annotations=sanitize(" ".join(str(annotations).split())),
        facts=facts,
        words=words,
        name=json.dumps(name, ensure_ascii=False),
        output=f"runs/{name}",
        start=model_folders.DEFAULT_MODEL,
        annotations_yaml=quoted,
        images=folder,
        train_part=train_part,
        val_part=f"{val_part} # the annotations of train",
        steps=steps,
        epochs=round(steps * images_per_step / in_training),
        images_per_step=images_per_step,
        warmup=min(50, steps // 10),
        every=max(20, steps // 5),
    )
    # What is written is what is run: a name that YAML reads in another way is told of here.
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:  # bytes that are no UTF-8, control characters
        paths = " or ".join(str(path) for path in (annotations, images) if path is not None)
        raise DataError(f"the path {paths} cannot be written in YAML", "rename it") from None
    raw = complete(read, model_folders.stored_settings)
    check(TrainSettings, raw, str(annotations))
    return text


_NTH = {2: "second", 5: "fifth"}


def _parts(annotations: Path, images: Path | None, count: int) -> tuple[str, str, int]:
    """The settings of what is trained on and of what is held out; images of the former.

    The file's own splits, if it has a training and a validation split; else every fifth image.
    """
    splits = coco_splits(annotations)
    held_out = sorted(filter(is_held_out, splits), key=lambda name: name.lower().startswith("test"))
    if "train" in splits and held_out:
        in_training = len(open_coco(annotations, images, split="train").groups)
        open_coco(annotations, images, split=held_out[0])  # or a split of no expressions is told
        return (
            "  split: train\n",
            f"{{dataset: coco, split: {json.dumps(held_out[0])}}}",
            in_training,
        )
    if count == 1:
        return "", "{dataset: coco}", 1
    held = 5 if count >= 5 else 2
    train_part = f"  leave_out_every: {held} # every {_NTH[held]} image is kept for validation\n"
    return train_part, f"{{dataset: coco, only_every: {held}}}", count - -(-count // held)


def _facts(source: SampleSource) -> tuple[str, str]:
    """What the file holds, and how far the bundled model knows its words."""
    texts = [phrase.text for group in source.groups for phrase in group.phrases]
    empty = sum(phrase.parts == () for group in source.groups for phrase in group.phrases)
    sizes = sorted((group.size for group in source.groups if group.size), key=max)
    stored = model_folders.read_model_folder(model_folders.find_model(None))
    known = KnownWords(TextTokenizer(load_tokenizer(stored.tokenizer), 32, 0), texts)
    facts = f"{counted(len(source.groups), 'image')}, {counted(len(texts), 'expression')}"
    if empty:
        facts += f" ({empty} of nothing in the image)"
    facts += f" of {known.words} words"
    if sizes:
        (height, width), (tall, wide) = sizes[0], sizes[-1]
        facts += f", {width}x{height} to {wide}x{tall} pixels"
    words = f";\n# {len(known.unknown)} of these words are new to it" if known.unknown else ""
    return facts, words
