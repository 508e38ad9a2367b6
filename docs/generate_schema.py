"""Writes ``docs/report.schema.json``: the JSON schema of ``report.json``, from its classes.

Run it after a change: ``python docs/generate_schema.py``. A test holds the file to the classes.
"""

from __future__ import annotations

import json
from pathlib import Path

from risam_cli.evaluation.report.schema import Report


def generate() -> str:
    """The schema as indented JSON."""
    return json.dumps(Report.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("report.schema.json").write_text(generate(), encoding="utf-8")
