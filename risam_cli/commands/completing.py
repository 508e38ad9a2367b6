"""What the shell offers for values that click cannot guess: models, lists, devices, files.

Each function is a ``shell_complete`` of click. They run while somebody waits for a key press, so
nothing heavy is imported and no file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of bundled models, and folders."""
    # The shell's own completion of folders comes first: in bash it clears what is there.
    return [
        CompletionItem(incomplete, type="dir"),
        *(
            CompletionItem(path.name, help="bundled model")
            for path in sorted(BUNDLED.iterdir())
            if (path / "config.json").is_file() and path.name.startswith(incomplete)
        ),
    ]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Whatever files there are."""
    return [CompletionItem(incomplete, type="file")]


def devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The devices by name; whether they are there would take torch to say."""
    names = ("auto", "cpu", "cuda", "cuda:0", "mps")
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def comma_list(names: Sequence[str], alone: Sequence[str] = ()) -> Complete:
    """The rest of a list such as ``png,overlay``: names that are not in it yet.

    Args:
        alone: names that go with no other.
    """

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(text) for text in _continued(names, alone, incomplete)]

    return complete


def _continued(names: Sequence[str], alone: Sequence[str], incomplete: str) -> Iterator[str]:
    before, comma, begun = incomplete.rpartition(",")
    there = {name.strip() for name in before.split(",")}
    for name in (*names, *(() if comma else alone)):
        if name not in there and name.startswith(begun):
            yield f"{before}{comma}{name}"
