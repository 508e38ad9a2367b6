"""Fuzzing of what reads strangers' files: the project's own errors, bounded time and memory.

    python benchmarks/fuzz.py --cases 20000               every target, seeded mutations
    python benchmarks/fuzz.py --only image,rle --seed 7

Mutations start from sound inputs: bytes are changed, cut, doubled and spliced, and of JSON any
value becomes an odd one (NaN, 2^64, half a character, a list for a number). A case that raises
anything but RisamError, takes over ten seconds or runs out of memory is kept in ``--keep`` and
told.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_targets import TARGETS, Target

from risam_cli.errors import RisamError

SECONDS = 10.0  # that one case may take
MEMORY = 6 << 30  # bytes of address space
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, 0.5, "", "x", "\0", "\n", "\ud800", "../../x", "/dev/zero"),
    *("\x1b[31m", "\u202e", "x" * 5000, "1", [], {}, [[]], [None], [1, 2, 3, 4, 5, 6], {"id": 1}),
]
TOKENS = [b"\0", b"\xff", b"\n", b'"', b"{", b"[", b"]}", b",", b"-", b"1e999", b"NaN", b"\\ud800"]


class Slow(Exception):
    """A case took too long."""


def mutate(data: bytes, other: bytes, dice: random.Random, *, as_json: bool) -> bytes:
    """A changed input; ``other`` is one to splice with."""
    if as_json and dice.random() < 0.7:
        try:
            value = json.loads(data)
        except ValueError:
            pass
        else:
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                value = _odd_somewhere(value, dice)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        _change(out, other, dice)
    return bytes(out)


def _change(out: bytearray, other: bytes, dice: random.Random) -> None:
    at = dice.randrange(len(out) + 1)
    span = min(len(out) - at, int(dice.expovariate(0.1)) + 1)
    kind = dice.randrange(7)
    if kind == 0 and at < len(out):
        out[at] = dice.randrange(256)
    elif kind == 1 and at < len(out):
        out[at] ^= 1 << dice.randrange(8)
    elif kind == 2:
        del out[at : at + span]
    elif kind == 3:
        out[at:at] = out[at : at + span] * dice.choice((1, 2, 50))
    elif kind == 4:
        out[at:at] = dice.choice(TOKENS)
    elif kind == 5:
        del out[at:]
    else:
        begin = dice.randrange(len(other) + 1)
        out[at : at + span] = other[begin : begin + span]


def _odd_somewhere(value: Any, dice: random.Random) -> Any:
    """The same value with one node replaced, dropped or doubled."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        if dice.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _odd_somewhere(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        if dice.random() < 0.1:
            return value * 2
        return [*value[:at], _odd_somewhere(value[at], dice), *value[at + 1 :]]
    return dice.choice(ODD)


def attempt(run: Callable[[Path], object], path: Path) -> str:
    """How one case ended: ``read``, ``refused``, or the name of what must not have been raised."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        run(path)
    except RisamError as error:
        return "refused" if "\n" not in str(error) else "message of several lines"
    except (Exception, RecursionError) as error:
        traceback.print_exc(limit=-3, file=sys.stderr)
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def fuzz(name: str, target: Target, cases: int, seed: int, keep: Path) -> Counter[str]:
    """Runs mutations of a target's seeds; gives how many ended how."""
    ends: Counter[str] = Counter()
    dice = random.Random(f"{seed}/{name}")
    pool = list(target.seeds)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        suffix = ".yaml" if name == "category-map" else ""
        path = Path(folder, f"input{suffix}")
        for number in range(cases):
            data = mutate(dice.choice(pool), dice.choice(pool), dice, as_json=target.as_json)
            path.write_bytes(data)
            end = attempt(target.run, path)
            ends[end] += 1
            if end == "read" and len(pool) < 200 and len(data) < 1 << 16:
                pool.append(data)  # still sound: a start for stranger ones
            elif end not in ("read", "refused"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{seed}-{number}").write_bytes(data)
    return ends


def _slow(signum: int, frame: FrameType | None) -> None:
    raise Slow(f"over {SECONDS:g} s")


def main() -> int:
    """Prints a row a target; exit code 1 where anything ended as it must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="a target, slow ones fewer")
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, comma separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="for what is found")
    options = parser.parse_args()
    chosen = {name: TARGETS[name] for name in options.only.split(",")}
    signal.signal(signal.SIGALRM, _slow)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found = 0
    print(f"{'target':<16}{'cases':>8}{'read':>8}{'refused':>9}{'found':>7}{'s':>8}{'peak MB':>9}")
    for name, target in chosen.items():
        started = time.perf_counter()
        cases = max(1, round(options.cases * target.share))
        ends = fuzz(name, target, cases, options.seed, options.keep)
        odd = cases - ends["read"] - ends["refused"]
        found += odd
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        seconds = time.perf_counter() - started
        print(
            f"{name:<16}{cases:>8}{ends['read']:>8}{ends['refused']:>9}{odd:>7}"
            f"{seconds:>8.1f}{peak:>9}",
            flush=True,
        )
        for end in sorted(set(ends) - {"read", "refused"}):
            print(f"  {end}: {ends[end]}, kept in {options.keep}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
