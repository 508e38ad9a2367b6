"""Masks through each model's frame and back: nothing is lost but what the output's grid costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from risam_cli.data.images.frames import Frame, sam_frame
from risam_cli.segmenters.segmenter import GridMaps

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# The ceilings of the output grids, as they were measured apart from this code.
FRAMES = [
    pytest.param(sam_frame(1024), 256, 0.938, id="sam"),
    pytest.param(Frame("stretch", 1024, 1024, MEAN, STD), 256, 0.956, id="sam2"),
    pytest.param(Frame("stretch", 1008, 1008, MEAN, STD), 288, 0.964, id="sam3"),
    pytest.param(Frame("stretch", 352, 352, MEAN, STD), 352, 0.972, id="clipseg"),
]


def through(mask: NDArray[np.bool_], frame: Frame, grid: int) -> NDArray[np.bool_]:
    """A mask drawn on a frame's output grid by averaging, and read from there."""
    height, width = frame.fitted(*mask.shape)
    inside = max(1, round(height * grid / frame.height)), max(1, round(width * grid / frame.width))
    small = Image.fromarray(mask.astype(np.float32)).resize(inside[::-1], Image.Resampling.BOX)
    values = np.zeros((grid, grid), np.float32)
    values[: inside[0], : inside[1]] = small
    maps = GridMaps(torch.from_numpy(values)[None] - 0.5, frame, mask.shape)
    return (maps.logits(mask.shape)[0] > 0).numpy()


@pytest.mark.photos
@pytest.mark.parametrize(("frame", "grid", "ceiling"), FRAMES)
def test_masks_of_photos_reach_the_ceiling_of_the_grid(
    photos: Path, frame: Frame, grid: int, ceiling: float
) -> None:
    annotations = json.loads((photos.parent / "instances.json").read_bytes())
    sizes = {one["id"]: (one["height"], one["width"]) for one in annotations["images"]}
    found = []
    for one in annotations["annotations"]:
        size = sizes[one["image_id"]]
        rle = one["segmentation"]
        if isinstance(rle, list):
            rle = coco.merge(coco.frPyObjects(rle, *size))
        elif isinstance(rle["counts"], list):
            rle = coco.frPyObjects(rle, *size)
        mask = coco.decode(rle).astype(bool)
        back = through(mask, frame, grid)
        union = (mask | back).sum()
        found.append((mask & back).sum() / union if union else 1.0)
    assert len(found) == 740
    assert np.mean(found) == pytest.approx(ceiling, abs=0.012)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (480, 640), (640, 480)])
@pytest.mark.parametrize(
    "frame",
    [
        sam_frame(64),
        Frame("stretch", 64, 48, MEAN, STD),
        Frame("shortest", 64, 107, MEAN, STD),
    ],
    ids=["pad", "stretch", "shortest"],
)
def test_a_corner_stays_in_its_corner(frame: Frame, size: tuple[int, int]) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    picture[: max(1, size[0] // 2), : max(1, size[1] // 2)] = 255
    view = frame.resize(picture)
    assert view.shape[:2] == frame.fitted(*size)
    pixels = frame.batch([view])
    assert pixels.sizes == (view.shape[:2],)
    [maps] = pixels.values.mean(1, keepdim=True)
    found = frame.to_image(maps, size, size)[0]
    assert found.shape == size
    assert found.isfinite().all()
    if min(size) > 3:
        wrong = (found > 0).numpy() != (picture[..., 0] > 0)
        # Within the last pixel of the input, and nowhere else.
        assert wrong.mean() < 2 / min(view.shape[:2])
        assert not wrong[0, 0]
        assert not wrong[-1, -1]


def test_a_shortest_side_is_rounded_as_detr_does() -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    frame = Frame("shortest", 800, 1333, MEAN, STD)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(2, 3000, (400, 2)).tolist():
        theirs = get_size_with_aspect_ratio((height, width), 800, 1333)
        assert frame.fitted(height, width) == tuple(max(1, side) for side in theirs)


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "Sam", "GroundingDino"])
def test_a_folder_s_frame_is_its_image_processor(kind: str, tmp_path: Path) -> None:
    import transformers

    from risam_cli.segmenters.published import Folder, read_frame

    size = {
        "ViT": {"height": 60, "width": 44},
        "CLIP": {"height": 64, "width": 64},
        "Sam": {"longest_edge": 96},
        "GroundingDino": {"shortest_edge": 64, "longest_edge": 107},
    }[kind]
    more = {"pad_size": {"height": 96, "width": 96}} if kind == "Sam" else {}
    more |= {"do_center_crop": False} if kind == "CLIP" else {}
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(
        size=size, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], **more
    )
    processor.save_pretrained(tmp_path)
    frame = read_frame(Folder(tmp_path, "tiny"))
    rng = np.random.default_rng(1)
    for height, width in ((90, 150), (31, 12), (200, 201)):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        ours = frame.batch([frame.resize(picture)]).values
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
