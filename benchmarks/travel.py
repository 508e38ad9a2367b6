"""The bundled model on shapes that RefShapes has not drawn.

    python benchmarks/travel.py [MODEL] -o runs/travel [--scenes 250] [--seed 0]

Draws scenes with Pillow, by a painter and a speaker that share nothing with RefShapes but its
words and what docs/refshapes.md says that they mean: square, wide and high pictures of 240 to 640
pixels, textbook outlines in one colour each, sizes by the shorter side. They are written as
COCO-style JSON and scored by ``risam eval``, by kind of phrase and by the picture's form. It tells
how far a model has learned shapes and words, and how far a renderer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from risam_cli.masks import rle

COLORS = {
    "red": (215, 30, 35),
    "green": (40, 150, 60),
    "blue": (35, 75, 215),
    "yellow": (250, 220, 40),
    "purple": (125, 45, 165),
    "orange": (250, 140, 20),
    "cyan": (60, 215, 235),
    "pink": (255, 160, 195),
    "brown": (120, 75, 40),
    "gray": (130, 130, 130),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "hexagon", "cross", "diamond")
# Share of a whole turn that a shape may be turned by; more and a square is a diamond.
TURNS = {"square": 0.06, "diamond": 0.04, "cross": 0.06, "triangle": 0.08}
RADII = {"small": 0.06, "medium": 0.1, "large": 0.145}
WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
FIRSTS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
FINE = 3
"""Sub-pixels along a pixel's side."""
PHRASES = 6

Point = tuple[float, float]


@dataclass
class Thing:
    """One object: its words, centre and radius in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass
class Scene:
    """A picture (H, W, 3), its map (H, W) of things from 1, and (kind, text, numbers of things)."""

    image: Image.Image
    labels: NDArray[np.uint8]
    things: list[Thing]
    said: list[tuple[str, str, list[int]]] = field(default_factory=list)


def main() -> None:
    """Draws, evaluates and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="refshapes-tiny")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/travel"))
    parser.add_argument("--scenes", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file = write(options.output, options.scenes, options.seed)
    report = options.output / "report"
    command = [sys.executable, "-m", "risam_cli", "eval", "--dataset", "coco", "--root", str(file)]
    command += ["--images", str(file.parent / "images"), "--model", options.model]
    command += ["--slice", "kind", "--slice", "form", "-o", str(report), "--overwrite"]
    subprocess.run(command, check=True)
    print((report / "report.md").read_text(encoding="utf-8"))


def write(folder: Path, scenes: int, seed: int) -> Path:
    """Draws scenes into ``folder/images`` and gives the COCO-style JSON beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "expressions": []}
    for number in range(scenes):
        scene = draw(random.Random(f"{seed}/{number}"), number)
        name = f"{number:04d}.png"
        scene.image.save(folder / "images" / name)
        width, height = scene.image.size
        found["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        first = len(found["annotations"])
        for k in range(len(scene.things)):
            mask = scene.labels == k + 1
            found["annotations"].append(
                {
                    "id": first + k,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": rle.encode(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
        form = "square" if width == height else "wide" if width > height else "high"
        for kind, text, chosen in scene.said:
            found["expressions"].append(
                {
                    "id": len(found["expressions"]),
                    "image_id": number,
                    "text": text,
                    "ann_ids": [first + k for k in chosen],
                    "kind": kind,
                    "form": form,
                }
            )
    file = folder / "scenes.json"
    whole = {**found, "categories": [{"id": 1, "name": "object"}]}
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


# --- painting -------------------------------------------------------------------------------------


def draw(rng: random.Random, number: int) -> Scene:
    """A scene with up to eight things, none of which touch, and phrases about them."""
    width = rng.choice((256, 300, 320, 400, 512, 640))
    height = rng.choice((width, width, 240, 256, 300, 400, 480))
    side = min(width, height)
    ground = np.array([rng.randint(60, 235) for _ in range(3)], np.float32)
    image = np.broadcast_to(ground, (height, width, 3)).copy()
    look = rng.choice(("flat", "gradient", "noise"))
    if look == "gradient":
        image += np.linspace(-40, 40, width, dtype=np.float32)[None, :, None]
    if look == "noise":
        noise = np.random.default_rng(number).normal(0, 14, (height, width, 1))
        image += noise.astype(np.float32)
    visible = [c for c, rgb in COLORS.items() if np.abs(np.array(rgb) - ground).sum() > 130]
    colors = rng.sample(visible, min(len(visible), rng.randint(2, 4)))
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    wanted = rng.randint(3, 8)
    things: list[Thing] = []
    labels = np.zeros((height, width), np.uint8)
    for _ in range(80):
        size = rng.choice(tuple(RADII))
        radius = RADII[size] * side * rng.uniform(0.95, 1.05)
        x = rng.uniform(radius + 2, width - radius - 2)
        y = rng.uniform(radius + 2, height - radius - 2)
        if any(math.hypot(x - t.x, y - t.y) < 1.05 * (radius + t.radius) for t in things):
            continue
        thing = Thing(rng.choice(shapes), rng.choice(colors), size, x, y, radius)
        things.append(thing)
        cover = paint(thing, rng.uniform(-1, 1) * TURNS.get(thing.shape, 1), (width, height))
        color = np.array(COLORS[thing.color], np.float32) + rng.uniform(-12, 12)
        image += (cover / np.float32(255))[:, :, None] * (color - image)
        labels[cover > 127] = len(things)
        if len(things) == wanted:
            break
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(0.8))
    scene = Scene(picture, labels, things)
    Speaker(rng, scene).speak()
    return scene


def paint(thing: Thing, turn: float, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Coverage (H, W), 0..255, of a thing turned by a share of a whole turn."""
    canvas = Image.new("L", (size[0] * FINE, size[1] * FINE), 0)
    pen = ImageDraw.Draw(canvas)
    x, y, radius = FINE * thing.x, FINE * thing.y, FINE * thing.radius
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if thing.shape == "ring":
            hole = 0.55 * radius
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        corners = [
            (x + radius * (a * c - b * s), y + radius * (a * s + b * c))
            for a, b in outline(thing.shape)
        ]
        pen.polygon(corners, fill=255)
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), np.uint8)


def outline(shape: str) -> list[Point]:
    """Corners of a shape of radius 1 around the origin, y down."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "cross":
        arm = [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32)]
        quarters: list[Point] = []
        for _ in range(4):
            quarters += arm
            arm = [(-b, a) for a, b in arm]
        return quarters
    count = {"triangle": 3, "hexagon": 6, "star": 10}[shape]
    reach = [0.42 if shape == "star" and k % 2 else 1.0 for k in range(count)]
    angles = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


# --- speaking -------------------------------------------------------------------------------------


class Speaker:
    """Says six things about a scene, each of them clear."""

    def __init__(self, rng: random.Random, scene: Scene) -> None:
        self.rng = rng
        self.scene = scene
        self.things = scene.things
        height, width = scene.labels.shape
        self.width, self.height = width, height
        self.longer = max(height, width)

    def speak(self) -> None:
        """Fills the scene's list of what is said."""
        ways: dict[str, Callable[[Thing], tuple[str, list[int]] | None]] = {
            "attribute": self.attribute,
            "place": self.place,
            "relation": self.relation,
            "plural": self.plural,
            "none": self.none,
        }
        known: set[str] = set()
        for _ in range(60):
            kind = self.rng.choices(tuple(ways), (3, 2, 2, 2, 1))[0]
            for _ in range(20):
                made = ways[kind](self.rng.choice(self.things))
                if made is not None and made[0] not in known:
                    known.add(made[0])
                    self.scene.said.append((kind, *made))
                    break
            if len(known) == PHRASES:
                return

    def named(self, words: Sequence[str]) -> list[int]:
        """Things that attributes fit."""
        return [
            k
            for k, t in enumerate(self.things)
            if set(words) <= {t.shape, t.color, t.size, "object"}
        ]

    def noun(self, thing: Thing) -> list[str] | None:
        """Words of a thing; a size is said where no other of the name is of medium size."""
        words = [thing.shape if self.rng.random() < 0.85 else "object"]
        if self.rng.random() < 0.6:
            words.insert(0, thing.color)
        if thing.size != "medium" and self.rng.random() < 0.5:
            if any(self.things[k].size == "medium" for k in self.named(words)):
                return None
            words.insert(0, thing.size)
        return words

    def attribute(self, thing: Thing) -> tuple[str, list[int]] | None:
        """As "the small red ring"."""
        words = self.noun(thing)
        if words is None or len(found := self.named(words)) != 1:
            return None
        return " ".join(("the", *words)), found

    def plural(self, thing: Thing) -> tuple[str, list[int]] | None:
        """As "all the red rings"."""
        words = self.noun(thing)
        if words is None or len(found := self.named(words)) < 2:
            return None
        last = words[-1] + ("es" if words[-1] == "cross" else "s")
        return " ".join(("all the", *words[:-1], last)), found

    def place(self, thing: Thing) -> tuple[str, list[int]] | None:
        """As "the leftmost ring", or "the ring at the top" where the others are not there."""
        words = self.noun(thing)
        if words is None or len(found := self.named(words)) < 2:
            return None
        axis, sign = FIRSTS[first := self.rng.choice(tuple(FIRSTS))]
        centres = [(t.x, t.y)[axis] for t in self.things]
        at = sorted((sign * centres[k], k) for k in found)
        if self.rng.random() < 0.5:
            if at[1][0] - at[0][0] < 0.08 * self.longer:
                return None
            return " ".join(("the", first, *words)), [at[0][1]]
        whole = self.height if axis else self.width
        ways = [(value if sign > 0 else whole + value) / whole for value, _ in at]
        if ways[0] > 0.4 or ways[1] < 0.55:
            return None
        side = {"leftmost": "on the left", "rightmost": "on the right"}.get(first)
        side = side or {"topmost": "at the top", "bottommost": "at the bottom"}[first]
        return " ".join(("the", *words, side)), [at[0][1]]

    def relation(self, thing: Thing) -> tuple[str, list[int]] | None:
        """As "the ring left of the red star"."""
        words, start = self.noun(thing), self.rng.choice(self.things)
        anchor = [start.color, start.shape]
        if words is None or start is thing or len(self.named(anchor)) != 1:
            return None
        relation = self.rng.choice(tuple(WAYS))
        found = []
        for k in self.named(words):
            other = self.things[k]
            if other is start:
                continue
            dx, dy = other.x - start.x, other.y - start.y
            wx, wy = WAYS[relation]
            off = math.degrees(math.atan2(abs(dx * wy) + abs(dy * wx), dx * wx + dy * wy))
            if off < 38 and math.hypot(dx, dy) > 0.1 * self.longer:
                found.append(k)
            elif off < 58:
                return None
        if len(found) != 1:
            return None
        return " ".join(("the", *words, relation, "the", *anchor)), found

    def none(self, thing: Thing) -> tuple[str, list[int]] | None:
        """As "the red ring" where there is none."""
        words = [self.rng.choice(tuple(COLORS)), self.rng.choice(SHAPES)]
        if self.rng.random() < 0.5:  # Half of it is there.
            place = self.rng.randrange(2)
            words[place] = (thing.color, thing.shape)[place]
        if self.named(words):
            return None
        return " ".join(("the", *words)), []


if __name__ == "__main__":
    main()
