"""``python -m risam_cli``: the same as ``risam``."""

from __future__ import annotations

import sys

from risam_cli.cli import main

sys.exit(main())
