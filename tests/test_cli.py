"""The root command as a user meets it: exit codes, messages, lazy imports, shared options."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner
from support.cli import Cli
from support.docs_blocks import calls, wrong_usage
from support.paths import REPO

from risam_cli.cli import COMMANDS, main, root
from risam_cli.commands import options
from risam_cli.console.console import Console, get_console, set_console
from risam_cli.errors import DataError, Interrupted, OutputError, UsageError
from risam_cli.version import __version__

HEAVY = {"torch", "transformers", "cv2", "numpy", "rich", "pydantic", "PIL", "tensorboard"}


@pytest.fixture(autouse=True)
def _fresh_console() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    set_console(Console())
    for number, handler in before.items():
        signal.signal(number, handler)


def register(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Make ``function`` the body of ``risam fake``."""
    module = ModuleType("risam_cli.commands.fake")
    module.command = click.command("fake")(options.verbosity_options(function))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "fake", ("fake", "A command for tests."))


# --- help and version -----------------------------------------------------------------------------


def test_help_lists_every_command(cli: Cli) -> None:
    shown = cli("--help", env={"COLUMNS": "80"})
    assert shown.returncode == 0
    assert "3 finished, but some items failed" in shown.stdout
    assert "\\b" not in shown.stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown.stdout, re.MULTILINE)


def test_version(cli: Cli) -> None:
    shown = cli("--version")
    assert (shown.returncode, shown.stdout) == (0, f"risam, version {__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_takes_the_common_options(name: str) -> None:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    assert command.name == name
    children = command.commands.values() if isinstance(command, click.Group) else [command]
    for child in children:
        given = {flag for parameter in child.params for flag in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--debug"} <= given, child.name
        assert child.help, child.name
        assert "\\b" not in child.help, "click wants the character, so the docstring is not raw"
        assert all(p.help for p in child.params if isinstance(p, click.Option)), child.name


def _imported_by(*args: str) -> set[str]:
    script = (
        "import sys; from risam_cli.cli import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=REPO, check=True
    )
    return set(done.stderr.split())


def test_help_of_the_root_imports_no_command_and_nothing_heavy() -> None:
    loaded = _imported_by("--help")
    assert not HEAVY & loaded
    assert not loaded & {f"risam_cli.commands.{module}" for module, _ in COMMANDS.values()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    assert not HEAVY & _imported_by(name, "--help")


@pytest.mark.parametrize("args", [["--help"], ["predict", "--help"]])
def test_help_is_quick(args: list[str]) -> None:
    """Under twice the time of importing click alone, plus 0.1 s; a busy machine's waits aside."""
    ours = [sys.executable, "-m", "risam_cli", *args]
    floor = [sys.executable, "-c", "import click"]

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def seconds(command: list[str]) -> float:
        start = spent()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=REPO)
        return spent() - start

    seconds(ours)  # write the .pyc files
    for _ in range(4):  # a busy machine may spoil a round; interleaved, it slows both alike
        pairs = [(seconds(ours), seconds(floor)) for _ in range(3)]
        took, click_alone = (statistics.median(times) for times in zip(*pairs, strict=True))
        if took < 2 * click_alone + 0.1:
            return
    pytest.fail(f"{took:.3f} s against {click_alone:.3f} s for click alone")


# --- exit codes and messages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (DataError("a.json: no 'images'", "give COCO"), 1, "error: a.json: no 'images'; give COCO"),
        (OutputError("line 1\nline 2"), 1, r"error: line 1\nline 2"),
        (UsageError("--a and --b", "give one"), 2, "error: --a and --b; give one"),
        (Interrupted("stopped after 3 images"), 130, "error: stopped after 3 images"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "error: /x/y: Permission denied"),
        (
            ValueError("odd"),
            1,
            "error: internal error: ValueError: odd; run again with --debug for the traceback",
        ),
    ],
)
def test_an_outcome_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Any,
    code: int,
    message: str,
) -> None:
    def body() -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    register(monkeypatch, body)
    assert main(["fake"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (message + "\n" if message else "")


@pytest.mark.parametrize("args", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_shows_the_traceback_before_and_after_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    def body() -> None:
        raise DataError("broken")

    register(monkeypatch, body)
    assert main(args) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith("\nerror: broken\n")


@pytest.mark.parametrize(
    ("args", "quiet", "verbose"),
    [
        (["fake"], False, False),
        (["-q", "fake"], True, False),
        (["fake", "--quiet"], True, False),
        (["--verbose", "fake"], False, True),
        (["fake", "-v"], False, True),
    ],
)
def test_verbosity_before_and_after_the_command(
    monkeypatch: pytest.MonkeyPatch, args: list[str], quiet: bool, verbose: bool
) -> None:
    seen: list[tuple[bool, bool]] = []

    def body() -> None:
        seen.append((get_console().quiet, get_console().verbose))

    register(monkeypatch, body)
    assert main(args) == 0
    assert seen == [(quiet, verbose)]
    assert main(["fake"]) == 0
    assert seen[1] == (False, False)  # one run leaves nothing to the next


def test_quiet_and_verbose_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, lambda: None)
    assert main(["-q", "fake", "-v"]) == 2
    assert "contradict each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["--no-such-option"], "No such option"),
        (["-q", "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_is_exit_2(cli: Cli, args: list[str], says: str) -> None:
    done = cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert "Usage: risam" in done.stderr
    assert "Traceback" not in done.stderr


# --- signals and pipes ----------------------------------------------------------------------------

# A job that a shell runs in the background ignores SIGINT, and its children inherit that.
FAKE = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
import click
from risam_cli import cli
from risam_cli.commands.options import verbosity_options
module = types.ModuleType("risam_cli.commands.fake")
@click.command()
@verbosity_options
def command():
    {body}
module.command = command
sys.modules[module.__name__] = module
cli.COMMANDS["fake"] = ("fake", "")
sys.exit(cli.main(["fake"]))
"""


def fake(body: str) -> list[str]:
    return [sys.executable, "-c", FAKE.format(body=body.replace("\n", "\n    "))]


def start(body: str, *before: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, *fake(body)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_unwinds_and_exits_130(number: signal.Signals) -> None:
    process = start(
        "try:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except Exception:\n"  # what a loop over items does must not swallow the stop
        "            pass\n"
        "finally:\n"
        "    print('kept', flush=True)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert out == "kept\n"
    assert err == "error: interrupted\n"


@pytest.mark.parametrize("body", ["", "from risam_cli.interrupts import StopRequest\n"])
def test_nohup_keeps_a_run_going(body: str) -> None:
    waits = "print('ready', flush=True)\ntime.sleep(0.5)\nprint('done', flush=True)"
    if body:
        waits = f"{body}with StopRequest() as stop:\n    " + waits.replace("\n", "\n    ")
        waits += "\n    assert not stop.requested"
    process = start(waits, "nohup")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "done\n", "")


@pytest.mark.parametrize("told_of", [True, False])
def test_a_terminal_that_closes_costs_no_work(tmp_path: Path, told_of: bool) -> None:
    """Its shell may tell of it or not (``disown``); what is still said must not end the run."""
    body = (
        "import pathlib\n"
        "from risam_cli.console.console import get_console\n"
        "from risam_cli.errors import Interrupted\n"
        "from risam_cli.interrupts import StopRequest\n"
        "with StopRequest(notice='stopping') as stop:\n"
        "    with get_console().progress('work', 99, 'steps') as bar:\n"
        f"        pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "        for _ in range(8):\n"
        "            time.sleep(0.2)\n"
        "            bar.advance()\n"
        "            get_console().info('going on')\n"
        f"pathlib.Path({str(tmp_path)!r}, 'kept').touch()\n"
        "if stop.requested:\n"
        "    raise Interrupted('interrupted')"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        if not told_of:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv(sys.executable, fake(body))
    while not (tmp_path / "ready").exists():
        os.read(terminal, 999)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert (tmp_path / "kept").exists()
    assert code == (130 if told_of else 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_dies_of_sigterm_in_silence() -> None:
    process = start(
        "import os, signal\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(60)\n"
        "time.sleep(0.2)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "print(os.WTERMSIG(os.waitpid(child, 0)[1]))"
    )
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, f"{int(signal.SIGTERM)}\n", "")


@pytest.mark.parametrize("body", ["while True: print('x' * 9999)", "print('x')"])
def test_a_reader_that_has_left_hears_nothing_more(body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(body, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, "")


def test_another_broken_pipe_is_not_hushed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    register(monkeypatch, body)
    assert main(["fake"]) == 1
    assert "a pipe to another process broke" in capfd.readouterr().err


def test_a_full_disk_under_stdout_is_told() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("w") as target:
        done = subprocess.run(
            [sys.executable, "-m", "risam_cli", "--version"],
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: stdout: No space left on device\n"


def test_a_mistyped_command_is_told_with_the_one_that_is_near(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pedict", "photos"]) == 2
    assert "No such command 'pedict'. Did you mean 'predict'?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "No such command 'xyzzy'.\n" in capsys.readouterr().err


def _leaves(command: click.Command, path: str) -> list[tuple[str, str]]:
    """Every command below ``command``, itself too, with its help."""
    # click keeps what the first context made of --help; -h is the root's own word.
    context = click.Context(command, info_name=path, **root.context_settings)
    found = [(path, command.get_help(context))]
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        child = command.get_command(context, name)
        assert child is not None
        found += _leaves(child, f"{path} {name}")
    return found


def test_every_help_has_two_worked_examples_that_parse() -> None:
    for path, text in _leaves(root, "risam"):
        _, _, examples = text.partition("Examples:\n")
        lines = [line.strip() for line in examples.partition("\n\n")[0].splitlines()]
        asked = [call for line in lines for call in calls(line)]
        assert len(asked) >= 2, path
        assert all(["risam", *call][: path.count(" ") + 1] == path.split() for call in asked) or (
            path in {"risam", "risam models"}
        )
        assert [wrong_usage(root, call) for call in asked] == [None] * len(asked), path


# --- shared options -------------------------------------------------------------------------------


def _commands(command: click.Command) -> list[click.Command]:
    """Every command below ``command``, itself too."""
    if not isinstance(command, click.Group):
        return [command]
    context = click.Context(command)
    children = [command.get_command(context, name) for name in command.list_commands(context)]
    return [command, *(found for child in children if child for found in _commands(child))]


def test_an_empty_path_does_not_stand_for_the_working_folder() -> None:
    params = [param for command in _commands(root) for param in command.params]
    paths = [param for param in params if isinstance(param.type, click.Path)]
    assert len(paths) > 20
    for param in paths:
        with pytest.raises(
            click.BadParameter, match=r"it is empty \(an unset variable\?\); name a"
        ):
            param.type.convert("", param, None)


@click.command()
@options.model_option
@options.device_options
@options.batch_options
@options.output_option("out")
@options.run_mode_options
@options.threshold_options
@options.json_option
@options.verbosity_options
def everything(**values: object) -> None:
    click.echo(repr(values))


def test_shared_options_have_the_documented_names_and_defaults() -> None:
    shown = CliRunner().invoke(everything, [])
    assert shown.exit_code == 0, shown.output
    assert eval(shown.output, {"PosixPath": Path, "WindowsPath": Path}) == {
        "model": None,
        "device": "auto",
        "precision": "auto",
        "batch_size": 8,
        "workers": None,
        "output": Path("out"),
        "resume": False,
        "overwrite": False,
        "threshold": None,
        "no_target_threshold": None,
        "as_json": False,
    }


def test_shared_options_are_listed_in_the_order_of_their_decorators() -> None:
    shown = CliRunner().invoke(everything, ["--help"]).output
    names = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE)
    assert names[:5] == ["--model", "--device", "--precision", "--batch-size", "--workers"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "gpu"], "'gpu' is not auto, cpu, mps, cuda or cuda:N"),
        (["--device", "cuda:x"], "'cuda:x' is not"),
        (["--precision", "int8"], "'int8' is not one of"),
        (["--batch-size", "0"], "0 is not in the range"),
        (["--workers", "-1"], "-1 is not in the range"),
        (["--threshold", "1.5"], "1.5 is not in the range 0 to 1"),
        (["--threshold", "nan"], "nan is not in the range 0 to 1"),
        (["--no-target-threshold", "-inf"], "-inf is not in the range 0 to 1"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--overwrite", "--resume"], "contradict each other"),
    ],
)
def test_a_value_out_of_range_is_wrong_usage(args: list[str], says: str) -> None:
    shown = CliRunner().invoke(everything, args)
    assert shown.exit_code == 2
    assert says in shown.output


def test_an_output_without_a_default_is_required() -> None:
    @click.command()
    @options.output_option(None)
    def command(output: Path) -> None:
        click.echo(str(output))

    assert CliRunner().invoke(command, []).exit_code == 2
    assert CliRunner().invoke(command, ["-o", "x"]).output == "x\n"


# --- what other tools call it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["predict", "x.png", "--prompt", "a dog"], "Did you mean '--expression'?"),
        (["explain", "x.png", "--text", "a dog"], "Did you mean '--expression'?"),
        (["predict", "x.png", "--format", "coco"], "`risam export-masks --to FORMAT`"),
        (["export-masks", "x", "--format", "yolo", "-o", "y"], "Did you mean '--to'?"),
        (["eval", "--data", "x"], "Did you mean '--root'?"),
        (["train", "x.yaml", "--epochs", "3"], "'--steps'"),
        (["predict", "x.png", "--weights", "w"], "Did you mean '--model'?"),
        (["predict", "x.png", "--force"], "Did you mean '--overwrite'?"),
        (["predict", "x.png", "--treshold", "1"], "'--threshold'"),
    ],
)
def test_an_option_of_other_tools_is_answered_with_ours(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert main(args) == 2
    told = capsys.readouterr().err
    assert "No such option" in told
    assert says in told


@pytest.mark.parametrize("phrase", ["the person in red", "dog", "who is this?"])
def test_a_phrase_among_the_inputs_is_told_where_it_goes(
    capsys: pytest.CaptureFixture[str], phrase: str
) -> None:
    assert main(["predict", str(REPO / "sample_data/images"), phrase]) == 1
    told = capsys.readouterr().err
    assert f"{phrase}: no such file or folder" in told
    assert f"--expression {phrase!r}" in told


def test_a_missing_folder_is_no_phrase_where_one_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", "photos", "-e", "dog"]) == 1
    told = capsys.readouterr().err
    assert "photos: no such file or folder" in told
    assert "--expression" not in told


def test_choices_are_taken_in_any_case() -> None:
    for name, (module, _) in COMMANDS.items():
        command = __import__(f"risam_cli.commands.{module}", fromlist=["command"]).command
        for param in getattr(command, "params", []):
            if isinstance(param.type, click.Choice):
                ctx = click.Context(command)
                for one in param.type.choices:
                    assert param.type.convert(str(one).upper(), param, ctx) == one, (name, param)
