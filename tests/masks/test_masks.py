"""RLE: against pycocotools, by property, and against whatever a file may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from risam_cli.errors import DataError
from risam_cli.masks import rle as masks

any_mask = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24))


def uncompressed(mask: np.ndarray) -> list[int]:
    """Run lengths, spelled out pixel by pixel."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = pixel
    return runs


@given(any_mask)
def test_encode_is_pycocotools_and_decode_undoes_it(mask: np.ndarray) -> None:
    rle = masks.encode(mask)
    reference = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle == {"size": list(mask.shape), "counts": reference["counts"].decode()}
    back = masks.decode(rle)
    assert back.dtype == np.bool_
    assert back.flags.c_contiguous
    assert (back == mask).all()


@given(any_mask)
def test_area_and_bbox_are_those_of_the_pixels(mask: np.ndarray) -> None:
    rle = masks.encode(mask)
    assert masks.area(rle) == mask.sum()
    ys, xs = np.nonzero(mask)
    box = (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1) if len(xs) else (0, 0, 0, 0)
    assert masks.bbox(rle) == box


@given(hnp.arrays(np.bool_, st.tuples(*[st.integers(0, 4), st.integers(1, 9), st.integers(1, 9)])))
def test_a_batch_is_its_masks_one_by_one(batch: np.ndarray) -> None:
    assert masks.encode_batch(batch) == [masks.encode(mask) for mask in batch]


@given(hnp.arrays(np.bool_, st.tuples(st.just(3), st.integers(1, 12), st.integers(1, 12))))
def test_union_and_intersection_are_those_of_the_pixels(three: np.ndarray) -> None:
    size = three.shape[1:]
    a, b, c = masks.encode_batch(three)
    assert masks.union([a, b, c], size) == masks.encode(three.any(axis=0))
    assert masks.union([a], size) == a
    both, either = masks.intersection_union(a, b)
    assert both == (three[0] & three[1]).sum()
    assert either == (three[0] | three[1]).sum()


def test_empty_masks() -> None:
    nothing = masks.empty((3, 5))
    assert nothing == masks.encode(np.zeros((3, 5), bool))
    assert masks.union([], (3, 5)) == nothing
    assert masks.intersection_union(nothing, nothing) == (0, 0)
    assert masks.bbox(nothing) == (0, 0, 0, 0)
    assert masks.encode_batch(np.zeros((0, 3, 5), bool)) == []


def test_a_view_and_a_byte_mask_are_taken_as_they_look() -> None:
    mask = np.random.default_rng(1).random((2, 20, 30)) < 0.5
    assert masks.encode_batch(mask[::-1, ::2, ::-3]) == [
        masks.encode(m.copy()) for m in mask[::-1, ::2, ::-3]
    ]
    assert masks.encode(mask[0].astype(np.uint8) * 255) == masks.encode(mask[0])


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)])
def test_encode_refuses_what_is_no_mask(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        masks.encode(np.zeros(shape, bool))


def test_masks_of_two_sizes_do_not_mix() -> None:
    a, b = masks.empty((3, 4)), masks.empty((4, 3))
    with pytest.raises(DataError, match="4x3"):
        masks.intersection_union(a, b)
    with pytest.raises(DataError, match="4x3"):
        masks.union([a, b], (3, 4))


# --- parse_rle ------------------------------------------------------------------------------------


@given(any_mask, st.sampled_from(["compressed", "bytes", "list", "tuple size"]))
def test_every_form_of_an_rle_is_read(mask: np.ndarray, form: str) -> None:
    rle = masks.encode(mask)
    given_form: dict[str, Any] = {
        "compressed": dict(rle),
        "bytes": {"size": rle["size"], "counts": rle["counts"].encode()},
        "list": {"size": rle["size"], "counts": uncompressed(mask)},
        "tuple size": {"size": mask.shape, "counts": rle["counts"], "id": 3},
    }[form]
    assert masks.parse_rle(given_form, size=mask.shape, where="here") == rle
    assert masks.parse_rle(given_form, size=None, where="here") == rle


@given(any_mask, st.data())
def test_equal_masks_get_equal_strings(mask: np.ndarray, data: st.DataObject) -> None:
    runs = uncompressed(mask)
    for _ in range(data.draw(st.integers(1, 4))):  # runs of length 0 change nothing
        at = data.draw(st.integers(0, len(runs)))
        runs[at:at] = [0, 0]
    padded = {"size": list(mask.shape), "counts": runs}
    assert masks.parse_rle(padded, size=None, where="here") == masks.encode(mask)


counts = st.one_of(
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(), max_size=6),
    st.lists(st.integers(0, 10), max_size=6),
    st.lists(st.one_of(st.floats(), st.booleans(), st.none(), st.text(max_size=2)), max_size=3),
    st.none(),
    st.integers(),
)
side = st.one_of(st.integers(0, 6), st.integers(), st.floats(), st.booleans(), st.none())


@given(st.lists(side, max_size=3), counts)
@example([2**31, 2**31], "0")
@example([2**16, 2**16], [2**32])
@example([2**40, 1], [2**40])
@example([1, 4], [2**32 + 4])
@example([1, 4], [2**63, 4])
@example([1, 4], [2**64 + 4])
@example([1, 4], [-4, 8])
@example([1, 4], "o" * 100 + "0")
@example([1, 4], "ooooooo0")
@example([1, 4], "oooooo" + "?")
@example([1, 1], "P")
@example([4, 4], "")
@example([0, 0], "")
@example([1, 4], [True, 3])
def test_no_rle_from_outside_does_harm(size: list[Any], runs: object) -> None:
    """Either a mask of just that size, or the family's error that names the place."""
    try:
        rle = masks.parse_rle({"size": size, "counts": runs}, size=None, where="file, line 7")
    except DataError as error:
        message = str(error)
    else:
        assert rle["size"] == size
        if size[0] * size[1] < 1e6:
            assert masks.encode(masks.decode(rle)) == rle
        return
    assert "file, line 7" in message
    assert "\n" not in message


@given(any_mask, st.data())
def test_a_damaged_string_is_noticed_or_is_another_mask(
    mask: np.ndarray, data: st.DataObject
) -> None:
    text = masks.encode(mask)["counts"]
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=32, max_codepoint=127))
    damaged = {"size": list(mask.shape), "counts": text[:at] + other + text[at + 1 :]}
    try:
        rle = masks.parse_rle(damaged, size=mask.shape, where="here")
    except DataError:
        return
    assert masks.decode(rle).shape == mask.shape
    assert (rle == masks.encode(mask)) == (masks.decode(rle) == mask).all()


@pytest.mark.parametrize("obj", [None, [], "0", 3, {}, {"size": [1, 1]}, {"counts": "1"}])
def test_what_is_no_rle_is_named(obj: object) -> None:
    with pytest.raises(DataError, match=r"line 2: not an RLE"):
        masks.parse_rle(obj, size=None, where="line 2")


def test_the_size_must_be_the_images() -> None:
    rle = masks.empty((3, 5))
    with pytest.raises(DataError, match=r"3x5 \(height x width\), the image is 5x3"):
        masks.parse_rle(rle, size=(5, 3), where="here")


def test_a_sum_that_is_off_by_one_is_named() -> None:
    with pytest.raises(DataError, match=r"sum to 14 pixels, not 3 x 5 = 15"):
        masks.parse_rle({"size": [3, 5], "counts": [3, 4, 7]}, size=None, where="here")


# --- COCO polygons --------------------------------------------------------------------------------

coordinate = st.floats(-5, 45, width=32)
ring = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8).map(
    lambda points: [v for point in points for v in point]
)


@given(st.lists(ring, min_size=1, max_size=3), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_coco_polygons_are_rasterized_as_pycocotools_does(
    rings: list[list[float]], size: tuple[int, int]
) -> None:
    reference = coco.decode(coco.merge(coco.frPyObjects(rings, *size))).astype(bool)
    assert (masks.decode(masks.from_polygons(rings, size)) == reference).all()


@pytest.mark.parametrize(
    "polygon",
    [
        [],
        [1, 1, 5, 5],  # pycocotools would take four numbers for a box
        [1, 1, 5, 5, 3],
        [1, 1, 5, 5, 3, float("nan")],
        [1, 1, 5, 5, 3, float("inf")],
        [1, 1, 5, 5, 3, 1e300],
        [0, 0, 9e6, 9e6, 0, 9e6] * 100,  # within pycocotools' ints one by one, not in sum
        [1, 1, 5, 5, 3, "x"],
        [[1, 1], [5, 5], [3, 1]],
        None,
        [1, 1, 5, 5, 3, 10**400],
    ],
)
def test_a_bad_coco_polygon_is_named(polygon: Any) -> None:
    with pytest.raises(DataError, match=r"ann 7, polygon 1"):
        masks.from_polygons([[0, 0, 4, 0, 4, 4], polygon], (10, 10), where="ann 7")


def test_no_coco_polygons_are_an_empty_mask() -> None:
    assert masks.from_polygons([], (4, 6)) == masks.empty((4, 6))
