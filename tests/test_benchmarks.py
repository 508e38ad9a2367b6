"""What the benchmarks share: clocks, bounds, tables, files and the plot. No figure is held here."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPO


@pytest.fixture
def benchmarks(repo: Path) -> Iterator[Any]:
    """``common``, ``plot`` and ``run`` as they import each other, under no name that stays."""
    folder = str(repo / "benchmarks")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and folder in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]


def _rows(common: Any) -> dict[str, list[Any]]:
    return {
        "encoder": [
            common.Row("a <b> & c", 7.46, "s", (7.4, 8.22), "one thread"),
            common.Row("fast against slow", 2.5, "times", (2.4, 2.6), wanted=">= 1.6"),
            common.Row("share", 0.4, "", None, wanted="<= 0.3334"),
        ],
        "parity": [common.Row("mean IoU", 0.9974, "IoU", wanted=">= 0.99")],
    }


def test_a_bound_is_met_missed_or_not_there(benchmarks: Any) -> None:
    rows = _rows(benchmarks("common"))
    assert [row.meets() for row in rows["encoder"]] == [None, True, False]
    assert rows["parity"][0].meets()


def test_rows_come_back_from_csv_as_they_were(benchmarks: Any) -> None:
    common = benchmarks("common")
    rows = _rows(common)
    assert common.from_csv(common.to_csv(rows)) == rows


def test_the_table_says_what_is_missed_and_keeps_digits_below_one(benchmarks: Any) -> None:
    common = benchmarks("common")
    lines = common.table([row for rows in _rows(common).values() for row in rows]).splitlines()
    assert lines[3].split()[-3:] == [">=", "1.6", "met"]
    assert lines[4].endswith("MISSED")
    assert "0.99740" in lines[5]
    assert [common.short(v) for v in (1234.5, 12.345, 0.0123, 2e-7, 0)] == [
        "1,234", "12.3", "0.0123", "2e-07", "0",
    ]  # fmt: skip


def test_the_plot_is_a_picture_with_every_figure_that_has_a_unit(benchmarks: Any) -> None:
    common, plot = benchmarks("common"), benchmarks("plot")
    picture = ET.fromstring(plot.bars(_rows(common)))
    texts = [node.text for node in picture.iter() if node.tag.endswith("text")]
    assert "a <b> & c" in texts
    assert "mean IoU" in texts
    assert "share" not in texts
    classes = [node.get("class") for node in picture.iter() if node.tag.endswith("rect")]
    assert classes == [None, "bar", "met", "met"]


def test_ways_are_timed_in_turns(benchmarks: Any) -> None:
    common = benchmarks("common")
    order: list[str] = []
    times = common.in_turns(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))},
        3,
        warm_up=1,
    )
    assert order == ["a", "b"] * 4
    assert len(times["a"].wall) == len(times["a"].cpu) == 3
    assert min(times["b"].wall) >= 0.01
    row = common.ratio("b against a", [2.0, 4.0, 9.0], [1.0, 1.0, 3.0], ">= 2")
    assert (row.value, row.spread, row.meets()) == (3.0, (2.0, 4.0), True)


def test_the_memory_of_a_process_and_its_children_is_its_own(benchmarks: Any) -> None:
    common = benchmarks("common")
    script = (
        "import multiprocessing, time\n"
        "m = multiprocessing.get_context('fork')\n"
        "both = m.Barrier(2)\n"
        "def hold():\n x = bytearray(b'1') * 60_000_000; both.wait(); time.sleep(1)\n"
        "p = m.Process(target=hold); p.start(); hold(); p.join(); print('[7]')"
    )
    child = common.run_child([sys.executable, "-c", script], every=0.02)
    assert child.last_json() == [7]
    assert child.wall >= 1
    if Path("/proc/self/smaps_rollup").exists():
        assert 110e6 < child.peak < 250e6
    failed = common.run_child([sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RuntimeError, match="exit code 1: no such thing"):
        failed.last_json()


def test_every_part_of_the_command_is_there(benchmarks: Any, repo: Path) -> None:
    run = benchmarks("run")
    for part in run.PARTS:
        text = (repo / "benchmarks" / f"{part}.py").read_text(encoding="utf-8")
        assert "def measure(options: Options) -> list[Row]:" in text, part


def test_figures_bear_the_name_of_their_machine(benchmarks: Any) -> None:
    run = benchmarks("run")
    host = {"processor": "Intel(R) Xeon(R) 8481C @ 2.7GHz, amx_bf16", "cores": "2"}
    assert run.name_of(host) == "intel-r-xeon-r-8481c-2-7ghz-amx-bf16-2-cores"
    assert run.name_of({**host, "gpu": "NVIDIA H100"}) == "nvidia-h100-2-cores"


def test_a_part_is_written_beside_what_earlier_runs_left(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common, run = benchmarks("common"), benchmarks("run")
    rows = _rows(common)
    for part in ("parity", "encoder"):
        module = type(sys)(part)
        module.measure = lambda options, part=part: rows[part]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, part, module)
        monkeypatch.setattr(sys, "argv", ["run.py", part, "-o", str(tmp_path)])
        assert run.main() == (1 if part == "encoder" else 0)  # one of its figures is missed
    name = run.name_of(common.machine())
    found, machines = run.load(tmp_path, name)
    assert found == rows
    assert set(machines) == {"encoder", "parity"}
    assert machines["parity"]["command"].startswith("python benchmarks/run.py parity")
    assert "MISSED" in (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.svg").is_file()


def test_figures_of_a_quick_run_do_not_land_among_the_real_ones(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = benchmarks("run")
    for arguments, message in ((["--quick"], "name a folder"), (["speed"], "no part speed")):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit):
            run.parse()
        assert message in capsys.readouterr().err


def test_the_plan_for_many_machines_agrees_with_its_simulation(benchmarks: Any) -> None:
    """Where nothing is left to chance they say the same; where it is, chance costs little."""
    scale = benchmarks("scale")
    usual = scale.PARAMETERS
    calm = dataclasses.replace(usual, spread=0.0, fails_per_day=0.0)
    for images, workers in ((10**6, 1), (10**6, 100), (10**9, 10)):
        told, played = (make(images, workers, calm) for make in (scale.formula, scale.simulate))
        assert played.hours == pytest.approx(told.hours, rel=0.02)
        assert played.failures == 0
        rough = scale.simulate(images, workers, usual)
        assert told.hours * 0.98 < rough.hours < told.hours * 1.1
    assert scale.formula(10**9, 1000, usual).bound == "requests"
    failing = dataclasses.replace(usual, fails_per_day=2.0)
    assert scale.simulate(10**9, 100, failing).hours > scale.simulate(10**9, 100, usual).hours


def test_a_hundredth_of_a_million_names_is_measured(benchmarks: Any) -> None:
    rows = benchmarks("scale").measure(benchmarks("common").Options(quick=True))
    by_name = {row.name: row for row in rows}
    assert by_name["shards: largest less smallest"].value <= 1
    assert all(row.value >= 0 for row in rows)


@pytest.mark.slow
def test_a_million_names_are_planned_within_a_minute_and_500_mb(repo: Path) -> None:
    """In a process of its own, whose peak memory is theirs alone."""
    code = "import common, scale; rows = scale.measure(common.Options()); "
    code += "print([row.name for row in rows if row.meets() is False])"
    place = {"cwd": repo / "benchmarks", "env": {**os.environ, "PYTHONPATH": str(repo)}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **place)
    assert done.stdout == "[]\n", done.stderr


def _scripts(tree: ast.Module) -> Iterator[ast.Module]:
    """A file and what it hands to other processes as text."""
    yield tree
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.search(r"^from risam_cli\S* import \w", text, re.MULTILINE):
            with suppress(SyntaxError):  # prose
                yield ast.parse(text)


@pytest.mark.parametrize("path", sorted((REPO / "benchmarks").rglob("*.py")), ids=lambda p: p.name)
def test_what_a_benchmark_imports_of_the_package_is_there(path: Path) -> None:
    """No type checker looks into a script that is a text."""
    for script in _scripts(ast.parse(path.read_text(encoding="utf-8"))):
        for node in ast.walk(script):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("risam_cli"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    )
                    assert found, f"{node.module} has no {alias.name}"


def _run(folder: Path, families: list[str], ious: list[float]) -> None:
    """A finished run's folder as the ablations read it: two validations, an answer per image."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as log:
        for step, miou in ((6, 0.375), (8, 0.5)):
            point = {"kind": "val", "step": step, "expressions": 64, "seconds": 1.0}
            point |= {f"{family}.miou": miou for family in families}
            point |= {"grefshapes.n_acc": 0.25, "grefshapes.t_acc": 1.0}
            log.write(json.dumps(point) + "\n")
    for family in families:
        report = folder / f"eval-{family}"
        report.mkdir()
        answers = [
            {"image": n, "iou": iou, "gt_no_target": n == 2, "answered_none": n == 2}
            for n, iou in enumerate(ious)
        ]
        (report / "per_expression.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        (report / "report.json").write_text("{}")


def test_the_table_of_ablations_outlives_the_runs(benchmarks: Any, tmp_path: Path) -> None:
    ablations = benchmarks("ablations")
    families = list(ablations.FAMILIES)
    runs, results = tmp_path / "8x1", tmp_path / "results.json"
    _run(runs / "risam-1", families, [0.9, 0.7, 1.0])
    _run(runs / "no_adapters-1", families, [0.6, 0.4, 1.0])
    budget = ablations.Budget(8, 1, None, "last.pt", 3, "bf16", "here")
    ablations.keep(results, runs, budget)
    before = ablations.table(ablations.answers(results), budget.name)
    shutil.rmtree(runs)
    ablations.keep(results, runs, budget)  # finds nothing new, keeps what is there
    assert ablations.table(ablations.answers(results), budget.name) == before
    rows = {line.split(" | ")[0]: line for line in before.splitlines()}
    assert "0.867" in rows["| RISAM"]
    assert "0.667" in rows["| without adapters"]
    assert "-0.200" in rows["| without adapters"]
    kept = json.loads(results.read_text())
    assert kept["runs"][0]["scores"]["N-acc"] == 1.0
    seeds = ablations.each_seed(kept).splitlines()
    assert seeds[1] == "| 8 steps of 1 images | seed 1 |"
    assert "| RISAM | 0.867 (+0.125) |" in seeds
