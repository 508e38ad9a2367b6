"""``risam predict``: masks for images and expressions, in batches that survive faults."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click

from risam_cli.commands import completing
from risam_cli.commands.options import (
    Place,
    bands_option,
    batch_options,
    cache_options,
    compile_option,
    confine_option,
    decode_option,
    device_options,
    instance_options,
    model_option,
    names_option,
    output_option,
    run_mode_options,
    threshold_options,
    verbosity_options,
)
from risam_cli.console.streams import require_open
from risam_cli.console.text import counted, first_of
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED, UsageError

if TYPE_CHECKING:
    from risam_cli.data.inputs.inputs import Inputs
    from risam_cli.outputs.naming import Names
    from risam_cli.runs.folder import RunFolder
    from risam_cli.runs.ranks import Ranks
    from risam_cli.runs.remote import RemoteRun
    from risam_cli.runs.shard import Shard

SAVE = ("png", "overlay", "html")
MAX_PIXELS = 178_956_970  # said here again, and held to risam_cli.data.images.images by a test
_NAMED = 4  # expressions that a line names
TIMEOUT = 120.0  # likewise, to risam_cli.inference.loading
_LONGEST_TIMEOUT = 1e9  # thirty years; threads wait no longer than some hundred, and not for ever


def _parse_save(ctx: click.Context, param: click.Parameter, value: str) -> frozenset[str]:
    names = frozenset(name.strip().lower() for name in value.split(",") if name.strip())
    unknown = names - {*SAVE, "none"}
    if unknown or not names:
        raise click.BadParameter(f"{value!r}: choose from {', '.join(SAVE)} and none.")
    if "none" in names and len(names) > 1:
        raise click.BadParameter(f"{value!r}: none goes with nothing else.")
    return names - {"none"}


def _parse_stream(ctx: click.Context, param: click.Parameter, value: str | None) -> bool:
    if value not in (None, "-"):
        raise click.BadParameter(f"{value!r}: only - (stdout); the file is in the output folder.")
    return value is not None


def _parse_timeout(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 < value <= _LONGEST_TIMEOUT:  # nan neither
        raise click.BadParameter(f"{value:g} is not a number of seconds above 0, up to 1e9.")
    return value


@click.command("predict")
@click.argument(
    "inputs",
    nargs=-1,
    required=True,
    metavar="INPUTS...",
    shell_complete=completing.files,
)
@click.option(
    "-e",
    "--expression",
    "given",
    multiple=True,
    metavar="TEXT",
    help="Expression for every image that has none of its own. May be given several times.",
)
@click.option(
    "--expressions",
    "expressions_file",
    type=Place(dir_okay=False),
    metavar="FILE",
    help="Like -e: one expression per line.",
)
@click.option(
    "--image-root",
    type=Place(file_okay=False, exists=True),
    metavar="DIR",
    help="Where relative paths in manifests start.  [default: beside the manifest]",
)
@model_option
@output_option("risam-out", remote=True)
@click.option(
    "--save",
    default="png",
    show_default=True,
    callback=_parse_save,
    shell_complete=completing.comma_list(SAVE, alone=("none",)),
    metavar="LIST",
    help="What to write beside the records: png, overlay, html (a gallery), none; comma separated.",
)
@click.option(
    "--jsonl",
    "stream",
    metavar="-",
    callback=_parse_stream,
    help="- also streams the records to stdout, in input order.",
)
@device_options
@compile_option
@batch_options
@cache_options
@decode_option
@threshold_options
@instance_options
@click.option(
    "--instances",
    is_flag=True,
    help="Write a record for each instance of an expression, with its `instance` number, mask, box "
    "and score.",
)
@names_option
@run_mode_options
@click.option("--retry-failed", is_flag=True, help="Like --resume, and also retry what failed.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    metavar="N",
    help="Stop once more than N items failed.  [default: never]",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Process only part I of N, counted from 0.  [default: all; under torchrun, each process "
    "its part, merged at the end]",
)
@click.option(
    "--no-merge",
    is_flag=True,
    help="Under torchrun, leave the parts as they are, for `risam merge`.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Process only the first N images."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    metavar="N",
    help="Refuse images with more pixels.",
)
@click.option(
    "--image-timeout",
    type=click.FloatRange(min=0, min_open=True),
    callback=_parse_timeout,
    default=TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Give up on an image that takes longer to read.",
)
@bands_option
@confine_option(
    "Refuse images of manifests and stdin that lie outside of --image-root, or of the "
    "manifest's folder: for lists from strangers."
)
@click.option(
    "-0",
    "null_separated",
    is_flag=True,
    help="With -: paths are NUL-terminated, as written by find -print0.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check every input without loading weights, and print what would be done.",
)
@verbosity_options
def command(**options: Any) -> int:
    """Find what expressions refer to in images, and write masks.

    INPUTS are images, folders, patterns, manifests (.jsonl, .csv, .tsv, COCO-style .json), tar
    shards or - for JSON Lines or, with -e, one path a line on stdin, in any mixture; on a disk, or
    in a store by its URL (s3://, gs://, hf://, https://).

    The output folder gets predictions.jsonl (one record for each image and expression),
    failures.jsonl, masks/ and run.json; with --save html also gallery/index.html, to look at.

    \b
    Examples:
      risam predict photos/ -e "the dog" -e "the person" --save png,html -o out
      risam predict list.jsonl --image-root photos -o out --resume
      cat asks.jsonl | risam predict - --save none --jsonl - > answers.jsonl
      find . -name "*.jpg" -print0 | risam predict - -0 -e "the dog" -o out
    """
    return _predict(_Options(**options))


@dataclass(frozen=True, slots=True)
class _Options:
    inputs: tuple[str, ...]
    given: tuple[str, ...]
    expressions_file: Path | None
    image_root: Path | None
    model: str | None
    output: Path
    save: frozenset[str]
    stream: bool
    device: str
    precision: str
    compiled: bool
    batch_size: int
    workers: int | None
    feature_cache: Path | None
    feature_cache_limit: int
    full_decode: bool
    threshold: float | None
    no_target_threshold: float | None
    instance_threshold: float | None
    select: Literal["union", "best"]
    instances: bool
    names: str | None
    resume: bool
    overwrite: bool
    retry_failed: bool
    max_failures: int | None
    shard: str | None
    no_merge: bool
    limit: int | None
    max_pixels: int
    image_timeout: float
    bands: tuple[int, int, int] | None
    confine: bool
    null_separated: bool
    dry_run: bool
    remote: RemoteRun | None = None


def _predict(options: _Options) -> int:
    from risam_cli.runs.ranks import ranks_of_environment
    from risam_cli.runs.shard import Shard, parse_shard

    if options.instances and options.select == "best":
        raise UsageError("--instances and --select best contradict each other", "give one of them")
    if options.feature_cache is not None:
        from risam_cli.segmenters.resolve import require_risam_name

        require_risam_name(options.model, "a feature cache")
    if options.retry_failed and options.overwrite:
        raise UsageError("--retry-failed and --overwrite contradict each other", "give one of them")
    ranks = None if options.shard is not None else ranks_of_environment()
    if "://" in str(options.output) and not options.dry_run:
        options = _made_here(options, alone=ranks is None)
    if ranks is not None:
        with ranks.speaking():
            return _predict_together(options, ranks)
    shard = Shard() if options.shard is None else parse_shard(options.shard)
    code = _predict_alone(options, shard, options.output)
    _publish(options)
    return code


def _made_here(options: _Options, *, alone: bool) -> _Options:
    """The options of a run whose output is to be uploaded, with the folder where it is made."""
    from risam_cli.files.remote import require_known
    from risam_cli.files.store import RemotePath
    from risam_cli.runs.remote import RemoteRun, local_place

    assert isinstance(options.output, RemotePath)
    require_known(options.output.url)
    remote = RemoteRun(options.output, local_place(options.output))
    resume = alone and (options.resume or options.retry_failed)
    remote.begin(resume=resume, overwrite=options.overwrite)
    return replace(options, output=remote.local, remote=remote)


def _publish(options: _Options) -> None:
    if options.remote is not None:
        options.remote.publish()


def _predict_alone(
    options: _Options, shard: Shard, output: Path, ranks: Ranks | None = None
) -> int:
    started = time.perf_counter()
    if "-" in options.inputs:
        require_open("stdin")
    if options.resume or options.retry_failed:
        options = _asking_again(options, output)
    inputs = _inputs(options, output)
    inputs.check()
    if options.dry_run:
        return _dry_run(options, inputs, shard, output)
    from risam_cli.runs.folder import RunFolder

    with ExitStack() as stack:
        stream = stack.enter_context(_records_only()) if options.stream and not ranks else None
        folder = stack.enter_context(RunFolder(output))
        _settle(folder, options)
        return _run(options, inputs, shard, folder, stream, started, ranks)


def _predict_together(options: _Options, ranks: Ranks) -> int:
    """One of the processes of torchrun: its part, and all parts together where it is the last."""
    from risam_cli.runs.shard import Shard

    if not _inputs(options, options.output).repeatable:
        raise UsageError(
            "stdin and pipes can be read by one process, not by those of torchrun",
            "write their content to a manifest",
        )
    if options.remote is not None and options.no_merge:
        raise UsageError("--no-merge needs an -o on a disk", "use --shard, each part with its -o")
    if options.stream and options.no_merge:
        raise UsageError("--jsonl streams the merged records, and --no-merge makes none")
    if options.dry_run:
        return _predict_alone(options, Shard(), options.output) if ranks.leads else EXIT_OK
    resume = options.resume or options.retry_failed
    if not ranks.begin(options.output, resume=resume, overwrite=options.overwrite):
        whole = replace(options, resume=True, overwrite=False)
        return _predict_alone(whole, Shard(), options.output) if ranks.leads else EXIT_OK
    part = ranks.shard.folder(options.output)
    resume, overwrite = ranks.settled(part, resume=options.resume, overwrite=options.overwrite)
    own = replace(options, resume=resume, overwrite=overwrite)
    with ranks.quietly():
        _predict_alone(own, ranks.shard, part, ranks)
    code = ranks.merge(options.output, keep=options.no_merge)
    if code is None:
        return EXIT_OK
    if options.stream:
        with _records_only() as stream, open(options.output / "predictions.jsonl", "rb") as file:
            shutil.copyfileobj(file, stream)
            stream.flush()
    _publish(options)
    return code


def _inputs(options: _Options, output: Path) -> Inputs:
    from risam_cli.data.inputs.inputs import Inputs

    expressions = _expressions(options)
    for argument in options.inputs:
        if os.path.isdir(argument) and os.path.realpath(argument) == os.path.realpath(output):
            raise UsageError(
                f"-o {output} is also the input folder", "give the results their own folder"
            )
    if options.null_separated and "-" not in options.inputs:
        raise UsageError("-0 is for paths on stdin", "name - among the inputs")
    return Inputs(
        options.inputs,
        expressions,
        options.image_root,
        exclude=options.output if options.remote is None else options.remote.url,
        confine=options.confine,
        null_separated=options.null_separated,
    )


def _expressions(options: _Options) -> list[str]:
    from risam_cli.data.inputs.expressions import read_expressions

    file = options.expressions_file
    return [*options.given, *([] if file is None else read_expressions(file))]


def _asking_again(options: _Options, output: Path) -> _Options:
    """The options of a run that goes on; where no expression is given, with those asked before.

    Raises:
        UsageError: what failed is to be tried again, but others are given than were asked.
    """
    from risam_cli.console.console import get_console
    from risam_cli.runs.folder import asked_before
    from risam_cli.runs.ranks import part_folders

    whole = options.output
    folders = [output, whole, *([] if "://" in str(whole) else part_folders(whole))]
    before = next(filter(None, map(asked_before, folders)), ())
    expressions = _expressions(options)
    if not before or tuple(expressions) == before:
        return options
    if not expressions:
        named = first_of([repr(text) for text in before], _NAMED)
        get_console().info(f"using the expressions of the run in {output}: {named}")
    elif not options.retry_failed:
        return options  # the inputs of a run may change
    elif sorted(expressions) != sorted(before):
        missing = [repr(text) for text in before if text not in expressions]
        surplus = [repr(text) for text in expressions if text not in before]
        told = [f"leaves out {', '.join(missing)}"] if missing else []
        told += [f"adds {', '.join(surplus)}"] if surplus else []
        raise UsageError(
            f"--retry-failed {' and '.join(told)}, unlike the run in {output}",
            "leave out -e and --expressions to use the same expressions",
        )
    return replace(options, given=before, expressions_file=None)


def _settle(folder: RunFolder, options: _Options) -> None:
    """What to do with what the output folder holds.

    Raises:
        OutputError: it holds a run, and it was not said what to do with it.
    """
    from risam_cli.runs.ranks import holds_another, holds_parts, part_folders, remove_parts

    if options.overwrite:
        folder.start_anew()
        remove_parts(folder.path)
    elif folder.holds_run():
        if not (options.resume or options.retry_failed):
            raise holds_another(folder.path)
    elif parts := part_folders(folder.path):
        raise holds_parts(folder.path, int(parts[0].name.rpartition("-")[2]))


def _run(
    options: _Options,
    inputs: Inputs,
    shard: Shard,
    folder: RunFolder,
    stream: BinaryIO | None,
    started: float,
    ranks: Ranks | None,
) -> int:
    """Loads the model and runs; torch is imported here and not before."""
    loading = time.perf_counter()
    from risam_cli.inference.device import choose_device, choose_precision, count_workers
    from risam_cli.inference.feature_cache import CacheSettings
    from risam_cli.inference.loader import warm_up
    from risam_cli.inference.pipeline import PredictSettings
    from risam_cli.runs.run import RunPlan, run_predict
    from risam_cli.runs.writer import Saving
    from risam_cli.segmenters.resolve import load_segmenter

    device = choose_device(options.device)
    settings = PredictSettings(
        device=device,
        precision=choose_precision(options.precision, device),
        batch_size=options.batch_size,
        workers=options.workers,
        threshold=options.threshold,
        no_target_threshold=options.no_target_threshold,
        max_pixels=options.max_pixels,
        timeout=options.image_timeout,
        lookahead=512,
        full_decode=options.full_decode,
        select="all" if options.instances else options.select,
        instance_threshold=options.instance_threshold,
        bands=options.bands,
    )
    imported = time.perf_counter()
    warm_up(count_workers(options.workers, device.type))
    segmenter = load_segmenter(
        options.model, device=device, precision=settings.precision, compiled=options.compiled
    )
    timings = {
        "startup": _since_process_start(started) + loading - started,
        "import_torch": imported - loading,
        "load_model": time.perf_counter() - imported,
    }
    plan = RunPlan(
        inputs,
        settings,
        Saving(
            "png" in options.save,
            "overlay" in options.save,
            options.max_pixels,
            html="html" in options.save,
            timeout=options.image_timeout,
            bands=options.bands,
            files=_files(options, inputs, folder),
        ),
        shard,
        options.limit,
        options.max_failures,
        options.retry_failed,
        tuple(sys.argv),
        timings,
        CacheSettings(options.feature_cache, options.feature_cache_limit)
        if options.feature_cache is not None
        else None,
        ranks,
    )
    return run_predict(plan, segmenter, folder, stream)


def _files(options: _Options, inputs: Inputs, folder: RunFolder) -> Names:
    """What images are called in the names of files; a run that goes on keeps to what it began."""
    from risam_cli.outputs.naming import Names
    from risam_cli.runs.ledger import read_header

    before = read_header(folder.ledger)
    if options.names is None and before is not None:
        names = Names.from_json(before.get("files"))
        if names.base:  # the inputs may have changed since
            inputs.require_own_names()
        return names
    if options.names == "base":
        inputs.require_own_names()
        return Names(base=True)
    return Names() if options.names == "absolute" else Names(inputs.common_folder())


def _dry_run(options: _Options, inputs: Inputs, shard: Shard, output: Path) -> int:
    """Says what would be done, on stdout; on stderr where stdout is promised to records."""
    from risam_cli.console.console import get_console
    from risam_cli.files.store import RemotePath
    from risam_cli.runs.dry_run import DryRun, EarlierRun, look_through
    from risam_cli.runs.ledger import LEDGER
    from risam_cli.runs.ranks import part_folders

    def say(text: str) -> None:
        click.echo(text, err=options.stream)

    found = DryRun()
    earlier = None
    if (options.resume or options.retry_failed) and not isinstance(output, RemotePath):
        folders = (output, *part_folders(output))
        earlier = EarlierRun(folders, retry=options.retry_failed)
    entries = (entry for entry in inputs if options.limit is None or entry.run < options.limit)
    own = shard.own(entries)
    for problem in look_through(own, found, options.max_pixels, options.bands, earlier):
        say(f"problem: {problem}")
    for line in found.first:
        say(line)
    if found.entries - found.covered > len(found.first):
        say("...")
    for reason, number in sorted(inputs.skipped.items()):
        say(f"skipped: {number} {reason}")
    before = f", {found.done} done already" if found.done else ""
    before += f", {found.failed} that failed before and are not retried" * bool(found.failed)
    holds = " (holds a run already)" if earlier is None and (output / LEDGER).exists() else ""
    say(
        f"{counted(found.images, 'image')}, {counted(found.records, 'record')} to make, "
        f"{found.bad} that would fail"
        f"{before}; output: {output}{holds}"
    )
    if not found.entries:
        get_console().warn("the inputs contain no image")  # an empty list is done at once
    return EXIT_SOME_FAILED if found.bad or found.failed else EXIT_OK


@contextmanager
def _records_only() -> Iterator[BinaryIO]:
    """Keeps stdout for records: whatever else is printed meanwhile goes to stderr."""
    require_open("stdout")
    sys.stdout.flush()
    stream = sys.stdout.buffer
    with redirect_stdout(sys.stderr):
        yield stream


def _since_process_start(now: float) -> float:
    """Seconds between the start of this process and ``now``; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks - (time.perf_counter() - now))
