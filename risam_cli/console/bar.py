"""A progress bar on a terminal, drawn by rich; imported only where one is drawn."""

from __future__ import annotations

from collections.abc import Iterable

from rich import progress as rich_progress
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.table import Column
from rich.text import Text

from risam_cli.console.count import Count


class Bar:
    """A bar with the count beside it and, where it is told, a line of where the time goes below.

    What stands beside the bar is made anew at each refresh, so rate and time left go on telling
    the truth while nothing comes.
    """

    def __init__(self, count: Count, description: str, screen: RichConsole) -> None:
        self._count = count
        self._ended = False
        self._live = _Live(self, screen)
        self._task = self._live.add_task(description, total=count.total, completed=count.done)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        self._live.stop()

    def advance(self, n: int = 1, **fields: object) -> None:
        """See :class:`risam_cli.console.console.Progress`."""
        with self._count.lock:
            self._count.add(n, fields)
            self._live.update(self._task, completed=self._count.done)

    def update(self, *, total: int | None = None, **fields: object) -> None:
        """See :class:`risam_cli.console.console.Progress`."""
        with self._count.lock:
            self._count.total = self._count.total if total is None else total
            self._count.fields.update(fields)
            self._live.update(self._task, total=self._count.total)

    def text(self) -> Text:
        """What stands beside the bar."""
        with self._count.lock:
            return Text(self._count.text(final=self._ended), no_wrap=True, overflow="ellipsis")

    def shares(self) -> Text:
        """What stands below it."""
        with self._count.lock:
            return Text(self._count.shares(), style="dim", no_wrap=True, overflow="ellipsis")


class _Live(rich_progress.Progress):
    def __init__(self, bar: Bar, screen: RichConsole) -> None:
        self._own = bar
        super().__init__(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=None),
            _Beside(bar),
            console=screen,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        below = self._own.shares()
        if below:
            yield below


class _Beside(rich_progress.ProgressColumn):
    def __init__(self, bar: Bar) -> None:
        self._own = bar
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: rich_progress.Task) -> Text:
        return self._own.text()
