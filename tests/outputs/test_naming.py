"""Names of mask files: readable, inside the folder, and never two alike."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from risam_cli.outputs.naming import mask_name, overlay_name, slug

AWKWARD = ["a.jpg", "A.jpg", "a.png", "..", ".", "", "sub", "Sub", "nul", "COM1.txt", "x:y"]
AWKWARD += [
    "ü",
    "u\u0308",
    "a.jpg__0-the-dog.png",
    "x.PNG",
    "a.jpg__0",
    "_up",
    "x" * 200,
    "tail. ",
    "new\nline",
]
AWKWARD += ["\ud800", "back\\slash"]
PARTS = st.sampled_from(AWKWARD)
IMAGES = st.one_of(st.lists(PARTS, min_size=1, max_size=5).map("/".join), st.text(max_size=40))


def test_a_plain_path_gives_a_plain_name() -> None:
    name = mask_name("street/car.jpg", 0, "the red car")
    assert name == "masks/street/car.jpg__0-the-red-car.png"
    assert mask_name("a.jpg", 3, "日本") == "masks/a.jpg__3.png"
    assert overlay_name("street/car.jpg", 0) == "overlays/street/car.jpg__0.png"


def test_paths_that_leave_the_folder_stay_inside() -> None:
    for image in ("../../etc/passwd.jpg", "/etc/passwd.jpg", "a/../../b.jpg", "..", "/", ""):
        parts = PurePosixPath(mask_name(image, 0, "x")).parts
        assert parts[0] == "masks"
        assert ".." not in parts
        assert len(parts) >= 2


def test_words_are_cut_between_words() -> None:
    assert slug("The  RED circle, on the left!") == "the-red-circle-on-the-left"
    assert slug("a" * 100) == "a" * 40
    long = slug("the second smallest of all the circles that are near the wall")
    assert len(long) <= 40
    assert long == "the-second-smallest-of-all-the-circles"
    assert slug("Ångström\n../x") == "angstrom-x"
    assert slug("///") == ""


@given(st.lists(st.tuples(IMAGES, st.integers(0, 3)), min_size=2, max_size=6, unique=True))
def test_names_never_collide_even_where_case_and_normal_forms_do(
    asked: list[tuple[str, int]],
) -> None:
    import unicodedata

    names = [mask_name(image, number, "The dog") for image, number in asked]
    folded = {unicodedata.normalize("NFC", name.casefold()) for name in names}
    assert len(folded) == len(asked)
    for name in names:  # nor is one a folder of another
        assert not any(other.startswith(name.casefold() + "/") for other in folded)
        assert not any(part.lower().endswith(".png") for part in name.split("/")[:-1])


@given(IMAGES, st.integers(0, 10_000), st.text(max_size=300))
def test_every_name_is_one_that_every_system_takes(image: str, number: int, text: str) -> None:
    name = mask_name(image, number, text)
    assert len(name.encode()) <= 300
    for part in name.split("/"):
        assert part not in {"", ".", ".."}
        assert len(part.encode()) <= 255
        assert part[-1] not in ". "
        assert not re.search(r'[\x00-\x1f\x7f<>:"|?*\\]', part)
        assert part.partition(".")[0].lower() not in {"nul", "con", "com1", "aux"}
    assert name == mask_name(image, number, text)
