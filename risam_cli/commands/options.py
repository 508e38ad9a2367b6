"""Options that several commands share, as decorators. What a command sees is in each docstring."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from risam_cli.commands import completing
from risam_cli.console.console import get_console
from risam_cli.errors import NameOf, UsageError, use_front_end
from risam_cli.files.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several; ``--help`` lists the options in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def choice(names: Sequence[str]) -> click.Choice[str]:
    """One of some names, in any case; the command gets it as it stands here."""
    return click.Choice(names, case_sensitive=False)


# --- paths ----------------------------------------------------------------------------------------


class LocalPath(click.Path):
    """A path on a disk; an empty one, such as that of a variable that is not set, is none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, but refuses what would stand for the working folder."""
        if value == "":
            self.fail(f"it is empty (an unset variable?); name a {self.name}.", param, ctx)
        return super().convert(value, param, ctx)


class Place(LocalPath):
    """A path that must be there, or a URL, of which the store is asked later."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """URLs as they are; everything else as click does."""
        from risam_cli.files.store import is_url, place

        if isinstance(value, str) and is_url(value):
            return place(value)
        return super().convert(value, param, ctx)


# --- how much is said -----------------------------------------------------------------------------


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Tell the console at once, so that errors in later options already follow it.

    It is the first that runs for a command, so messages are told here whose options they name.
    """
    use_front_end(option_names(ctx.command))
    console = get_console()
    if not value:
        return
    if param.name == "quiet":
        console.quiet = True
    elif param.name == "verbose":
        console.verbose = True
    else:
        console.tracebacks = True
    if console.quiet and console.verbose:
        raise UsageError("--quiet and --verbose contradict each other", "give one of them")


def option_names(command: click.Command) -> NameOf:
    """What a command calls the settings that messages speak of, by the names of its parameters.

    ``risam train`` has those of its YAML file too.
    """
    options: dict[str, str] = {}
    for param in command.params:
        if isinstance(param, click.Option):
            spelled = max(param.opts, key=len)
            options[spelled.lstrip("-").replace("-", "_")] = spelled
            options.setdefault(param.name or "", spelled)

    def name_of(key: str, value: str) -> str | None:
        if key in options:
            return options[key] if value in ("", "True") else f"{options[key]} {value}"
        if "set" in options:
            from risam_cli.settings.train import TrainSettings

            return f"--set {key}={value or '…'}" if key in TrainSettings.model_fields else None
        return None

    return name_of


_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "--expression": ("--prompt", "--text", "--phrase", "--query", "--caption", "--expr"),
    "--to": ("--format", "--type", "--output-format", "--export", "--as"),
    "--save": ("--format", "--type", "--output-format", "--export", "--draw", "--vis"),
    "--output": ("--out", "--out-dir", "--outdir", "--dest", "--save-dir", "--folder", "--project"),
    "--model": ("--ckpt", "--checkpoint", "--weights", "--pretrained", "--arch", "--resume-from"),
    "--device": ("--gpu", "--gpus", "--cuda", "--cpu", "--accelerator"),
    "--precision": ("--fp16", "--half", "--bf16", "--amp", "--dtype", "--float16"),
    "--overwrite": ("--force", "--clobber", "--exist-ok", "--replace"),
    "--resume": ("--continue", "--restart", "--skip-existing"),
    "--batch-size": ("--batch", "--bs", "--imgs"),
    "--workers": ("--num-workers", "--jobs", "--threads", "--processes", "--nproc"),
    "--image-root": ("--images", "--image-dir", "--img-dir", "--image-folder", "--data-root"),
    "--images": ("--image-root", "--image-dir", "--img-dir", "--image-folder"),
    "--root": ("--data", "--data-dir", "--data-root", "--path", "--dataset-root"),
    "--predictions": ("--pred", "--preds", "--results", "--masks", "--input"),
    "--threshold": ("--conf", "--confidence", "--score-threshold", "--mask-threshold"),
    "--min-score": ("--conf", "--confidence", "--score-threshold", "--threshold"),
    "--one-class": ("--class", "--classes", "--label", "--single-class", "--single-cls"),
    "--category-map": ("--classes", "--categories", "--class-map", "--labels"),
    "--split": ("--subset", "--part", "--set", "--val-split", "--train-split"),
    "--limit": ("--max", "--num", "--max-samples", "--max-images", "-n"),
    "--steps": ("--epochs", "--max-steps", "--num-steps", "--iters", "--iterations"),
    "--set": ("--lr", "--learning-rate", "--seed", "--batch-size", "--output", "--epochs"),
    "--protocol": ("--metric", "--metrics", "--eval-protocol"),
    "--jsonl": ("--json", "--stdout", "--stream"),
}
"""An option, and what other tools call the like of it."""


def suggest_option(error: click.NoSuchOption) -> click.UsageError:
    """The same error, with the options that the unknown one may stand for in other tools."""
    if error.ctx is None:
        return error
    own = {name for param in error.ctx.command.params for name in param.opts}
    meant = [name for name, others in _ELSEWHERE.items() if error.option_name in others]
    message = error.message
    if "--to" in meant and "--to" not in own:
        message += " Other formats are written by `risam export-masks --to FORMAT`."
    found = " or ".join(repr(name) for name in meant if name in own)
    return click.UsageError(f"{message} Did you mean {found}?", error.ctx) if found else error


_SPOKEN: dict[str, Any] = {
    "is_flag": True,
    "expose_value": False,
    "is_eager": True,
    "callback": _set_verbosity,
}


verbosity_options = _stack(
    click.option("-q", "--quiet", help="Only warnings and errors on stderr.", **_SPOKEN),
    click.option("-v", "--verbose", help="More messages on stderr.", **_SPOKEN),
    click.option("--debug", help="Show the traceback of an error.", **_SPOKEN),
)
"""``-q/--quiet``, ``-v/--verbose`` and ``--debug``; at the root and after every command.

They act on :func:`risam_cli.console.console.get_console`; the function gets no parameter.
"""


# --- model and device -----------------------------------------------------------------------------


model_option = click.option(
    "--model",
    metavar="NAME|PATH",
    default=None,
    shell_complete=completing.models,
    help="A folder written by `risam train`, a bundled model's name, or a published model: "
    "florence2, florence2-large, clipseg, sam3, grounded-sam, a Hugging Face folder or hub "
    "name, or KIND:FOLDER_OR_HUB_NAME[+SECOND].  [default: the bundled model]",
)
"""``--model``: parameter ``model: str | None``; None is the bundled model."""


def _check_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value.lower()):
        raise click.BadParameter(f"{value!r} is not auto, cpu, mps, cuda or cuda:N.")
    return value.lower()


device_options = _stack(
    click.option(
        "--device",
        metavar="NAME",
        default="auto",
        show_default=True,
        callback=_check_device,
        shell_complete=completing.devices,
        help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps.",
    ),
    click.option(
        "--precision",
        type=choice(PRECISIONS),
        default="auto",
        show_default=True,
        help="auto is bf16 if it is fast on the device, else fp32.",
    ),
)
"""``--device`` and ``--precision``: parameters ``device: str`` and ``precision: str``."""


compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Experimental, not yet measured on a GPU: compile the image encoder (CUDA only). "
    "It takes minutes before the first image and is cached for later runs.",
)
"""``--compile``: parameter ``compiled: bool``."""


batch_options = _stack(
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        default=8,
        show_default=True,
        help="Images per batch; halved automatically if memory runs out.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0, max=256),
        metavar="N",
        default=None,
        help="Loader processes; 0 reads in the main process.  [default: by core count]",
    ),
)
"""``--batch-size`` and ``--workers``: ``batch_size: int``, ``workers: int | None``."""


decode_option = click.option(
    "--full-decode",
    is_flag=True,
    help="Decode large JPEGs at full resolution. By default a JPEG of at least four times the "
    "encoder's size is decoded at reduced scale, in half the time.",
)
"""``--full-decode``: parameter ``full_decode: bool``."""


def _parse_bands(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        bands = tuple(int(part) for part in value.split(","))
    except ValueError:
        bands = ()
    if len(bands) != 3 or min(bands) < 1:
        raise click.BadParameter(f"{value!r}: three bands counted from 1, such as 3,2,1.")
    return bands


bands_option = click.option(
    "--bands",
    metavar="R,G,B",
    callback=_parse_bands,
    help="Which bands of TIFFs with four or more are red, green and blue, counted from 1.",
)
"""``--bands``: parameter ``bands: tuple[int, int, int] | None``."""


def confine_option(text: str) -> Callable[[F], F]:
    """``--confine``: parameter ``confine: bool``."""
    return click.option("--confine", is_flag=True, help=text)


def _parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


cache_options = _stack(
    click.option(
        "--feature-cache",
        type=LocalPath(file_okay=False),
        metavar="DIR",
        help="Store the image encoder's features here, in half precision, and reuse "
        "existing ones. Several runs may share the folder.",
    ),
    click.option(
        "--feature-cache-limit",
        metavar="SIZE",
        default="50GB",
        show_default=True,
        callback=_parse_size,
        help="Size limit of that folder.",
    ),
)
"""``--feature-cache`` and ``--feature-cache-limit``.

Parameters ``feature_cache: Path | None`` and ``feature_cache_limit: int``, in bytes.
"""


def check_unit(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """An option's value, if it is none or in 0..1."""
    # click.FloatRange lets nan through: every comparison with it is false.
    if value is not None and (math.isnan(value) or not 0 <= value <= 1):
        raise click.BadParameter(f"{value} is not in the range 0 to 1.")
    return value


UNIT: dict[str, Any] = {"type": float, "metavar": "P", "callback": check_unit}
"""What options of probabilities and scores have in common."""


threshold_options = _stack(
    click.option(
        "--threshold",
        help="Pixels above this probability are in the mask.  [default: the model's]",
        **UNIT,
    ),
    click.option(
        "--no-target-threshold",
        help="The mask is empty above this probability of `nothing fits`.  [default: the model's]",
        **UNIT,
    ),
)
"""``--threshold``, ``--no-target-threshold``: ``float | None`` each; None is the model's own.

Parameters ``threshold`` and ``no_target_threshold``, probabilities in 0..1.
"""


instance_options = _stack(
    click.option(
        "--select",
        type=choice(("union", "best")),
        default="union",
        show_default=True,
        help="For several instances of an expression: one mask of all, or only the best.",
    ),
    click.option(
        "--instance-threshold",
        help="Instances above this score count.  [default: the model's]",
        **UNIT,
    ),
)
"""``--select`` and ``--instance-threshold``, for models that tell instances from each other.

Parameters ``select: str`` and ``instance_threshold: float | None``, a score in 0..1.
"""


# --- output ---------------------------------------------------------------------------------------


def _check_output(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    if value == Path("-"):
        raise click.BadParameter("- is no folder; name one, records go to stdout by --jsonl -.")
    return value


class _Folder(Place):
    """A folder to write to."""

    def __init__(self, remote: bool) -> None:
        super().__init__(file_okay=False)
        self._remote = remote

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if "://" in str(found) and not self._remote:
            self.fail(f"{value!r}: a folder on a disk is needed here.", param, ctx)
        return found


def output_option(default: str | None, *, remote: bool = False) -> Callable[[F], F]:
    """``-o/--output DIR``: parameter ``output: Path``. Required where ``default`` is None.

    Args:
        remote: whether it may be a folder of a store.
    """
    # click takes a default that is named, even None, for a value that need not be given.
    needed: dict[str, Any] = {"required": True}
    return click.option(
        "-o",
        "--output",
        type=_Folder(remote),
        callback=_check_output,
        metavar="DIR",
        help="Folder to write to; created." + " May be a URL." * remote,
        **(needed if default is None else {"default": default, "show_default": True}),
    )


names_option = click.option(
    "--names",
    type=choice(("relative", "base", "absolute")),
    help="How images given by absolute paths are named in the output: from the folder that "
    "all share, by the file's name only, or by the whole path.  [default: relative]",
)
"""``--names``: parameter ``names: str | None``; None is relative."""


def _one_of_two(other: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    def check(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        if value and ctx.params.get(other):
            raise click.UsageError("--resume and --overwrite contradict each other.", ctx)
        return value

    return check


run_mode_options = _stack(
    click.option(
        "--resume",
        is_flag=True,
        callback=_one_of_two("overwrite"),
        help="Continue the run in the output folder.",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        callback=_one_of_two("resume"),
        help="Replace the run in the output folder.",
    ),
)
"""``--resume`` and ``--overwrite``: parameters ``resume: bool`` and ``overwrite: bool``.

Not both; neither means: refuse a folder that holds another run.
"""


json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")
"""``--json``: parameter ``as_json: bool``."""
