"""Each published model against transformers' own documented use of the same folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.nn import functional as F

from risam_cli.segmenters.clipseg import ClipSeg
from risam_cli.segmenters.florence2 import Florence2
from risam_cli.segmenters.grounded_sam import GroundedSam
from risam_cli.segmenters.published import Folder
from risam_cli.segmenters.sam3 import Sam3
from risam_cli.segmenters.segmenter import Instances

TEXTS = [
    "the dog",
    "the person in red",
    "a cat on the left",
    "two boats",
    "the tree",
    "blue hat of a man",
    "woman",
    "the car right of the tree",
]
CPU = torch.device("cpu")
Found = list[tuple[NDArray[np.bool_], float]]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    """A wide and a tall picture of smooth blobs and noise."""
    rng = np.random.default_rng(7)
    found = []
    for height, width in ((90, 150), (131, 77)):
        coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        picture = np.array(Image.fromarray(coarse).resize((width, height)), np.int16)
        picture += rng.integers(-20, 20, picture.shape, dtype=np.int16)
        found.append(np.clip(picture, 0, 255).astype(np.uint8))
    return found


def load(kind: type[Any], root: Path, *names: str) -> Any:
    return kind(*(Folder(root / name, name) for name in names), CPU, torch.float32)


def ask(segmenter: Any, picture: NDArray[np.uint8], texts: list[str]) -> Instances:
    inputs = [frame.batch([frame.resize(picture)]) for frame in segmenter.frames]
    features = segmenter.encode_images(inputs)
    rows = [0] * len(texts)
    [found] = segmenter.decode(features, segmenter.encode_texts(texts), rows, [picture.shape[:2]])
    return found


def answers(segmenter: Any, picture: NDArray[np.uint8], texts: list[str]) -> list[Found]:
    """For each text, masks and scores of its instances."""
    found = ask(segmenter, picture, texts)
    bar = segmenter.thresholds.mask
    bar = np.log(bar / (1 - bar))
    masks = (found.maps.logits(picture.shape[:2]) > bar).numpy()
    rows = iter(zip(masks, found.score.tolist(), strict=True))
    each = [[next(rows) for _ in range(count)] for count in found.counts]
    # Boxes that repeat another stand behind the others.
    return [sorted(one, key=lambda pair: -pair[1]) for one in each]


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = np.logical_or(one, other).sum()
    return 1.0 if union == 0 else float(np.logical_and(one, other).sum() / union)


def same(ours: list[Found], theirs: list[Found], least: float) -> None:
    """Equal counts, scores to 1e-5, masks to an IoU; and that the cases say anything at all."""
    assert [len(one) for one in ours] == [len(one) for one in theirs]
    flat = [
        pair
        for one, other in zip(ours, theirs, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    assert len(flat) >= 4
    for (mask, score), (their_mask, their_score) in flat:
        assert score == pytest.approx(their_score, abs=1e-5)
        assert iou(mask, their_mask) >= least
    areas = {int(mask.sum()) for (mask, _), _ in flat}
    assert len(areas) > 3
    assert any(0 < area < flat[0][0][0].size for area in areas)


# --- documented use -------------------------------------------------------------------------------


def documented_clipseg(folder: Path, picture: NDArray[np.uint8], texts: list[str]) -> list[Found]:
    processor = transformers.CLIPSegProcessor.from_pretrained(folder)
    network = transformers.CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    found: list[Found] = []
    for text in texts:
        inputs = processor(text=[text], images=[Image.fromarray(picture)], return_tensors="pt")
        logits = network(**inputs).logits.reshape(1, 1, 64, 64)
        whole = F.interpolate(logits, picture.shape[:2], mode="bilinear", align_corners=False)
        # The authors' 0.3, on the logit: log(0.3 / 0.7).
        mask = whole[0, 0] > float(np.log(0.3 / (1 - 0.3)))
        found.append([(mask.numpy(), float(logits.sigmoid().max()))])
    return found


def documented_sam3(folder: Path, picture: NDArray[np.uint8], texts: list[str]) -> list[Found]:
    # The processor needs torchvision; its steps by hand, as it documents them.
    image = Image.fromarray(picture).resize((56, 56), Image.Resampling.BILINEAR)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.Sam3Model.from_pretrained(folder).eval()
    found: list[Found] = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", padding="max_length", max_length=32)
        out = network(pixel_values=pixels, **tokens)
        # post_process_instance_segmentation(threshold=0.5, mask_threshold=0.5), but for logits
        # being interpolated in place of probabilities.
        scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
        order = [k for k in scores.argsort(descending=True) if scores[k] > 0.5]
        whole = F.interpolate(out.pred_masks, picture.shape[:2], mode="bilinear")[0]
        found.append([((whole[k] > 0).numpy(), float(scores[k])) for k in order])
    return found


def documented_florence2(folder: Path, picture: NDArray[np.uint8], texts: list[str]) -> list[Found]:
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    processor = transformers.Florence2Processor.from_pretrained(folder)
    network = transformers.Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    size = picture.shape[1], picture.shape[0]
    found: list[Found] = []
    for text in texts:
        inputs = processor(text=task + text, images=Image.fromarray(picture), return_tensors="pt")
        out = network.generate(
            **inputs,
            max_new_tokens=94,
            num_beams=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        written = out.sequences[0, 1:]
        likely = torch.stack(out.logits).softmax(-1)  # (tokens, beams, words)
        beams = out.beam_indices[0, : len(written)]
        taken = [float(likely[k, beams[k], token]) for k, token in enumerate(written)]
        spelled = processor.batch_decode(out.sequences, skip_special_tokens=False)[0]
        answer = processor.post_process_generation(spelled, task=task, image_size=size)[task]
        instances: Found = []
        for polygons in answer["polygons"]:
            canvas = Image.new("1", size)
            for polygon in polygons:
                ImageDraw.Draw(canvas).polygon(polygon, fill=1)
            instances.append((np.asarray(canvas), float(np.mean(taken))))
        found.append(instances)
    return found


def documented_dino(
    network: Any, processor: Any, picture: NDArray[np.uint8], text: str
) -> list[tuple[list[float], float]]:
    """Boxes in pixels and scores above 0.25, best first."""
    inputs = processor(images=Image.fromarray(picture), text=[[text]], return_tensors="pt")
    out = network(**inputs)
    own = [k for k, token in enumerate(inputs["input_ids"][0]) if token not in (101, 102, 1012)]
    scores = out.logits[0].sigmoid()[:, own].mean(1)
    x, y, w, h = out.pred_boxes[0].unbind(1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    corners = corners * torch.tensor([picture.shape[1], picture.shape[0]] * 2)
    order = [k for k in scores.argsort(descending=True) if scores[k] > 0.25]
    return [(corners[k].tolist(), float(scores[k])) for k in order]


def documented_sam(
    kind: str, folder: Path, picture: NDArray[np.uint8]
) -> Callable[[list[float]], NDArray[np.bool_]]:
    """The mask of a box in pixels."""
    network = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval()
    size = picture.shape[:2]
    if kind == "Sam2":  # whose processor needs torchvision
        image = Image.fromarray(picture).resize((128, 128), Image.Resampling.BILINEAR)
        mean = torch.tensor([0.485, 0.456, 0.406])
        std = torch.tensor([0.229, 0.224, 0.225])
        values = ((torch.from_numpy(np.array(image)) / 255 - mean) / std).permute(2, 0, 1)[None]
        scale = torch.tensor([128 / size[1], 128 / size[0]] * 2)
        fitted = (128, 128)
    else:
        processor = transformers.SamImageProcessorPil.from_pretrained(folder)
        inputs = processor(Image.fromarray(picture), return_tensors="pt")
        values = inputs["pixel_values"]
        fitted = tuple(int(v) for v in inputs["reshaped_input_sizes"][0])
        scale = torch.tensor([fitted[1] / size[1], fitted[0] / size[0]] * 2)

    def mask(box: list[float]) -> NDArray[np.bool_]:
        boxes = (torch.tensor(box) * scale)[None, None]
        out = network(pixel_values=values, input_boxes=boxes, multimask_output=False)
        whole = out.pred_masks[0]
        if kind != "Sam2":
            # SAM's own post-processing interpolates to 128 pixels, crops, and interpolates again,
            # which on so coarse a grid moves edges. Here once, as the pipeline does: each pixel of
            # the picture is looked up in the map.
            y, x = (
                (torch.arange(n) + 0.5) / n * (2 * inside / 128) - 1
                for n, inside in zip(size, fitted, strict=True)
            )
            where = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
            whole = F.grid_sample(whole, where, padding_mode="border", align_corners=False)
        else:
            whole = F.interpolate(whole, size, mode="bilinear", align_corners=False)
        return (whole[0, 0] > 0).numpy()

    return mask


# --- parity ---------------------------------------------------------------------------------------


def test_clipseg_is_equal(folders: Path, pictures: list[NDArray[np.uint8]]) -> None:
    segmenter = load(ClipSeg, folders, "clipseg")
    for picture in pictures:
        theirs = documented_clipseg(folders / "clipseg", picture, TEXTS)
        same(answers(segmenter, picture, TEXTS), theirs, 1.0)


def test_sam3_is_equal(folders: Path, pictures: list[NDArray[np.uint8]]) -> None:
    segmenter = load(Sam3, folders, "sam3")
    for picture in pictures:
        theirs = documented_sam3(folders / "sam3", picture, TEXTS)
        same(answers(segmenter, picture, TEXTS), theirs, 0.999)


def test_florence2_is_equal(folders: Path, pictures: list[NDArray[np.uint8]]) -> None:
    segmenter = load(Florence2, folders, "florence2")
    for picture in pictures:
        theirs = documented_florence2(folders / "florence2", picture, TEXTS)
        same(answers(segmenter, picture, TEXTS), theirs, 1.0)


@pytest.mark.parametrize(
    ("detector", "kind", "second", "least"),
    [
        ("dino", "Sam", "sam", 0.999),
        ("dino", "SamHQ", "sam-hq", 0.999),
        ("mm", "Sam2", "sam2", 0.999),
    ],
)
def test_grounded_sam_is_equal(
    folders: Path,
    pictures: list[NDArray[np.uint8]],
    detector: str,
    kind: str,
    second: str,
    least: float,
) -> None:
    segmenter = load(GroundedSam, folders, detector, second)
    processor = transformers.GroundingDinoProcessor.from_pretrained(folders / detector)
    network = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folders / detector)
    for picture in pictures:
        mask = documented_sam(kind, folders / second, picture)
        theirs = [
            [(mask(box), score) for box, score in documented_dino(network, processor, picture, t)]
            for t in TEXTS
        ]
        same(answers(segmenter, picture, TEXTS), theirs, least)


KINDS = [
    (ClipSeg, ("clipseg",)),
    (Florence2, ("florence2",)),
    (Sam3, ("sam3",)),
    (GroundedSam, ("dino", "sam")),
    (GroundedSam, ("dino", "sam-hq")),
    (GroundedSam, ("mm", "sam2")),
]


@pytest.mark.parametrize(("kind", "names"), KINDS, ids=lambda value: str(value)[-20:])
def test_eight_expressions_are_eight_single_calls(
    folders: Path, pictures: list[NDArray[np.uint8]], kind: type[Any], names: tuple[str, ...]
) -> None:
    segmenter = load(kind, folders, *names)
    picture = pictures[0]
    together = ask(segmenter, picture, TEXTS)
    start = 0
    for number, text in enumerate(TEXTS):
        alone = ask(segmenter, picture, [text])
        own = slice(start, start + together.counts[number])
        assert alone.counts == [together.counts[number]]
        assert torch.equal(alone.score, together.score[own])
        assert torch.equal(alone.nothing, together.nothing[number : number + 1])
        size = picture.shape[:2]
        assert torch.equal(alone.maps.logits(size), together.maps[own].logits(size))
        start += together.counts[number]


@pytest.mark.parametrize(("kind", "names"), KINDS, ids=lambda value: str(value)[-20:])
def test_an_image_does_not_depend_on_its_neighbours(
    folders: Path, pictures: list[NDArray[np.uint8]], kind: type[Any], names: tuple[str, ...]
) -> None:
    segmenter = load(kind, folders, *names)
    inputs = [frame.batch([frame.resize(p) for p in pictures]) for frame in segmenter.frames]
    features = segmenter.encode_images(inputs)
    texts = segmenter.encode_texts([*TEXTS[:2], *TEXTS[:2]])
    sizes = [p.shape[:2] for p in pictures]
    both = segmenter.decode(features, texts, [0, 0, 1, 1], sizes)
    for picture, found in zip(pictures, both, strict=True):
        alone = ask(segmenter, picture, TEXTS[:2])
        assert alone.counts == found.counts
        assert torch.equal(alone.score, found.score)
        size = picture.shape[:2]
        assert torch.equal(alone.maps.logits(size), found.maps.logits(size))
