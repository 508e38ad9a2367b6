"""Messages and progress on stderr."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from risam_cli.console.bar import Bar
from risam_cli.console.console import Console
from risam_cli.console.count import Count
from risam_cli.console.text import sanitize


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


# --- sanitize -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("two dögs — 犬", "two dögs — 犬"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("a\u2028b", r"a\u2028b"),
        (b"caf\xe9.png".decode("utf-8", "surrogateescape"), r"caf\xe9.png"),
        ("tag \U000e0041", r"tag \U000e0041"),
    ],
)
def test_sanitize_shows_what_a_terminal_would_obey(raw: str, shown: str) -> None:
    assert sanitize(raw) == shown


@given(st.text())
def test_sanitized_text_is_one_printable_line_and_stays_so(text: str) -> None:
    safe = sanitize(text)
    assert len(safe.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in safe)
    assert sanitize(safe) == safe
    safe.encode("utf-8")


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["i", "warning: w", "error: e", "b1", "b2"]),
        ({"quiet": True}, ["warning: w", "error: e"]),
        ({"verbose": True}, ["i", "d", "warning: w", "error: e", "b1", "b2"]),
    ],
)
def test_what_is_said_at_each_level(
    stream: io.StringIO, options: dict[str, bool], expected: list[str]
) -> None:
    console = Console(**options, stream=stream)
    console.info("i")
    console.debug("d")
    console.warn("w")
    console.error("e")
    console.block("b1\nb2\n")
    assert stream.getvalue().splitlines() == expected


def test_a_message_is_one_line_without_escapes(stream: io.StringIO) -> None:
    Console(stream=stream).warn("image 'a\n\x1b[31mb.png' is empty")
    assert stream.getvalue() == "warning: image 'a\\n\\x1b[31mb.png' is empty\n"


def test_a_block_keeps_its_lines_and_nothing_else(stream: io.StringIO) -> None:
    Console(stream=stream).block("a\x1b[2J\nb")
    assert stream.getvalue() == "a\\x1b[2J\nb\n"


def test_an_ascii_log_takes_any_message() -> None:
    raw = io.BytesIO()
    log = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream=log).info("犬.png")
    assert raw.getvalue() == b"\\u72ac.png\n"


def test_color_is_for_terminals_and_for_those_who_want_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Console(stream=terminal).error("no")
    assert "\x1b[31m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Console(stream=plain).error("no")
    assert plain.getvalue() == "error: no\n"


# --- progress -------------------------------------------------------------------------------------


def test_plain_progress_says_count_rate_and_time_left_every_few_seconds(
    stream: io.StringIO,
) -> None:
    clock = Clock()
    console = Console(stream=stream, clock=clock)
    with console.progress("predict", 100, "images") as progress:
        for _ in range(100):
            clock.now += 0.11
            progress.advance(failures=3)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # at 5 s, at 10 s, and the last one at 11 s
    assert lines[0] == "predict: 46/100 images, 9.09 images/s, 6s left, failures=3"
    assert lines[-1] == "predict: 100/100 images, 9.09 images/s, took 11s, failures=3"


def test_the_rate_follows_a_change_of_speed(stream: io.StringIO) -> None:
    clock = Clock()
    with Console(stream=stream, clock=clock).progress("train", 10_000, "steps") as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.advance()
        for _ in range(1000):
            clock.now += 0.1
            progress.advance()
        clock.now += 0.1
        progress.advance()
    assert "1061/10000 steps, 10 steps/s, 14m54s left" in stream.getvalue().splitlines()[-2]


def test_progress_without_a_total_gets_one_when_it_is_known(stream: io.StringIO) -> None:
    clock = Clock()
    with Console(stream=stream, clock=clock).progress("read", None, "lines") as progress:
        clock.now += 6
        progress.advance(12)
        progress.update(total=24, loss=0.123456)
        clock.now += 6
        progress.advance(12)
    first, second, _ = stream.getvalue().splitlines()
    assert first == "read: 12 lines, 2 lines/s"
    assert second == "read: 24/24 lines, 2 lines/s, 0s left, loss=0.1235"


def test_a_stopped_run_says_where(stream: io.StringIO) -> None:
    console = Console(stream=stream, clock=Clock())

    def stop() -> None:
        with console.progress("predict", 10, "images") as progress:
            progress.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert stream.getvalue() == "predict: stopped at 4/10 images, took 0s\n"


def test_where_the_time_goes_is_told_in_shares(stream: io.StringIO) -> None:
    clock = Clock()
    with Console(stream=stream, clock=clock).progress("predict", 4, "inputs") as progress:
        clock.now += 6
        progress.advance(2, failures=0, busy={"read": 1.0, "encode": 7.5, "write": 1.5, "x": 0.01})
    first, last = stream.getvalue().splitlines()
    assert first.endswith("6s left, failures=0; busy: encode 75%, write 15%, read 10%")
    assert last.endswith("took 6s, failures=0; busy: encode 75%, write 15%, read 10%")


def test_a_run_that_stalls_says_so(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("count", "console"):
        monkeypatch.setattr(f"risam_cli.console.{module}.STALLED", 0.02)
    clock = Clock()
    with Console(stream=stream, clock=clock).progress("predict", 4, "inputs") as progress:
        progress.advance()
        clock.now += 7.0
        limit = time.monotonic() + 120
        while "nothing for" not in stream.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("predict: 1/4 inputs")
    assert first.endswith("nothing for 7s")
    assert "nothing for" not in last


def test_a_bar_goes_on_telling_the_truth_while_nothing_comes(terminal: Terminal) -> None:
    clock = Clock()
    count = Count(100, "inputs", clock, 0)
    with Bar(count, "predict", RichConsole(file=terminal, width=120)) as bar:
        clock.now += 10
        bar.advance(50, busy={"encode": 3.0, "write": 1.0})
        assert bar.text().plain == "50/100 inputs, 5 inputs/s, 10s left"
        clock.now += 40
        assert bar.text().plain == "50/100 inputs, 1 inputs/s, 50s left, nothing for 40s"
        assert bar.shares().plain == "busy: encode 75%, write 25%"
    assert bar.text().plain == "50/100 inputs, 1 inputs/s, took 50s"
    assert "busy: encode 75%" in terminal.getvalue()


def test_quiet_progress_says_nothing(stream: io.StringIO) -> None:
    with Console(quiet=True, stream=stream).progress("x", 2, "images") as progress:
        progress.advance(2, failures=1)
        progress.update(total=3)
    assert stream.getvalue() == ""


def test_threads_lose_no_count(stream: io.StringIO) -> None:
    with Console(stream=stream).progress("x", 8000, "images") as progress:

        def work() -> None:
            for _ in range(1000):
                progress.advance()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "x: 8000/8000 images" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_messages_above_it(terminal: Terminal) -> None:
    console = Console(stream=terminal)
    with console.progress("pre[b]dict", 4, "images") as progress:
        progress.advance(3, failures=1)
        console.warn("[red]a.png[/red] is empty")
        progress.update(total=5)
        progress.advance()
    shown = terminal.getvalue()
    assert "pre[b]dict" in shown
    assert "4/5 images" in shown
    assert "failures=1" in shown
    assert "warning: [red]a.png[/red] is empty" in shown
    console.info("after")
    assert terminal.getvalue().endswith("after\n")


def test_a_bar_without_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(stream=terminal)
    with console.progress("predict", 4, "images") as progress:
        console.error("no")
        progress.advance(4)
    assert "\x1b[3" not in terminal.getvalue()  # moves of the cursor stay, colors do not


def test_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Console(stream=terminal).progress("predict", 4, "images") as progress:
        progress.advance(4)
    assert terminal.getvalue().startswith("predict: 4/4 images")
    assert "\x1b" not in terminal.getvalue()


def test_what_an_earlier_run_did_counts_as_done_but_not_towards_the_rate():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream=stream, clock=clock)
    with console.progress("train", 100, "steps", done=90) as progress:
        clock.now += 2.0
        progress.advance(4)
    last = stream.getvalue().splitlines()[-1]
    assert last == "train: 94/100 steps, 2 steps/s, took 2s"
