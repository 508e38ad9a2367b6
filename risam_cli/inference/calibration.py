"""What this machine's processor does best with, measured once and kept (ours).

``risam doctor`` measures and writes it; whatever computes on the CPU goes by it, and by the
documented defaults where there is none or it is of another machine. Which kernel multiplies changes
results by rounding alone, and the other choices change none, so ``run.json`` names the kernel and a
run that goes on keeps to it.
"""

from __future__ import annotations

import platform
import re
import threading
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from risam_cli.console.console import get_console
from risam_cli.files.caches import cache_folder
from risam_cli.files.write import write_file
from risam_cli.inference.device import MOST_LANES, PRECISIONS, precision_name
from risam_cli.model.fast.crew import threads_of
from risam_cli.model.fast.encoder import HostImageEncoder
from risam_cli.model.fast.linear import has_fast_products
from risam_cli.model.fast.tuning import DEFAULT, PRODUCTS, Product, Tuning, in_use, use

T = TypeVar("T")
TILES = (512, 768, 1024, 2048)
_GAIN = 1.03  # times faster from where another choice than the default is taken


class Choice(BaseModel):
    """What was measured to be best with encoders of one input size.

    Attributes:
        products: the kernel of large products, by precision.
        tile: tokens that go through the image encoder's blocks at a time.
        threads: that work on one image where images go side by side; None goes by the size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    products: dict[Literal["fp32", "bf16"], Product] = Field(default_factory=dict)
    tile: int = Field(DEFAULT.tile, ge=64, le=1 << 16)
    threads: int | None = Field(None, ge=1, le=1024)

    def tuning(self) -> Tuning:
        """The network's part of it."""
        known = {PRECISIONS[name]: one for name, one in self.products.items()}
        return Tuning(known, self.tile)


class Calibration(BaseModel):
    """What was measured on one machine.

    Attributes:
        processor, torch: of the machine that it holds for.
        by_side: by the side of the encoder's square input, in pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    processor: str
    torch: str
    by_side: dict[int, Choice] = Field(default_factory=dict)

    def of(self, side: int) -> Choice:
        """What to go by with inputs of some side."""
        return self.by_side.get(side, Choice())


def path_of_calibration() -> Path:
    """Where it is kept."""
    return cache_folder() / "calibration.json"


def processor() -> str:
    """The name and generation of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if named is None:
        return platform.processor() or platform.machine()
    # Clouds give generations of very different speed one name.
    numbers = re.findall(r"^(cpu family|model)\s*:\s*(\d+)$", text, re.MULTILINE)[:2]
    return ", ".join([named[1].strip(), *(f"{what} {number}" for what, number in numbers)])


@cache
def calibration() -> Calibration:
    """What this process goes by: what was kept, if it is of this machine and this torch."""
    default = Calibration(processor=processor(), torch=torch.__version__)
    path = path_of_calibration()
    try:
        kept = Calibration.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValidationError):
        get_console().warn(f"{path} is damaged and not used; `risam doctor` writes it again")
        return default
    of_this = (kept.processor, kept.torch) == (default.processor, default.torch)
    return kept if of_this else default


def keep(side: int, found: Choice) -> None:
    """Keeps what was measured for later processes, beside what is known of other sizes.

    Raises:
        OutputError: it cannot be written.
    """
    known = calibration()
    now = known.model_copy(update={"by_side": {**known.by_side, side: found}})
    write_file(path_of_calibration(), now.model_dump_json(indent=2) + "\n")
    calibration.cache_clear()


def calibrate(encoders: Iterable[HostImageEncoder], cores: int) -> Choice:
    """Measures on some blocks of an encoder, for some seconds with one as large as ViT-B.

    Args:
        encoders: one network's, held in one precision each, float32 among them.
        cores: that there are.
    """
    products: dict[Any, Product] = {}
    tile, threads = DEFAULT.tile, None
    before = in_use()
    try:
        for encoder in encoders:
            kind, by = encoder.precision, DEFAULT.product(encoder.precision)
            if has_fast_products(kind):
                ways = {way: Tuning({kind: way}) for way in PRODUCTS}
                by = products[precision_name(kind)] = _fastest(encoder, ways, by)
            if kind == torch.float32:
                sizes = {size: Tuning({kind: by}, size) for size in TILES}
                tile = _fastest(encoder, sizes, tile)
                use(sizes[tile])
                threads = _best_threads(encoder, cores)
    finally:
        use(before)
    return Choice(products=products, tile=tile, threads=threads)


def _fastest(encoder: HostImageEncoder, ways: dict[T, Tuning], default: T) -> T:
    """The choice with which one thread is fastest; the default unless another gains."""
    seconds: dict[T, float] = dict.fromkeys(ways, float("inf"))
    for _ in range(3):  # in turns, so that what else the machine does falls on all alike
        for way, tuning in ways.items():
            use(tuning)
            seconds[way] = min(seconds[way], _seconds(encoder, 1))
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[default] / seconds[best] >= _GAIN else default


def _best_threads(encoder: HostImageEncoder, cores: int) -> int:
    """Threads an image with which the machine encodes most images."""
    rates = {}
    for count in (1, 2, 4, 8):
        lanes = min(MOST_LANES, cores // count)
        if lanes:
            rates[count] = max(lanes / _seconds(encoder, count, lanes) for _ in range(2))
    return max(rates, key=rates.__getitem__)


def _seconds(encoder: HostImageEncoder, threads: int, lanes: int = 1) -> float:
    """Time in which images side by side go through some blocks, each with so many threads."""
    grid, dim = encoder.pos_embed.shape[1:3], encoder.pos_embed.shape[3]

    def run() -> None:
        with torch.inference_mode(), threads_of(threads):
            encoder.through_some(torch.ones(1, *grid, dim))

    beside = [threading.Thread(target=run) for _ in range(lanes - 1)]
    start = time.perf_counter()
    for thread in beside:
        thread.start()
    run()
    for thread in beside:
        thread.join()
    return time.perf_counter() - start
