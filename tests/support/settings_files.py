"""Settings out of files, as ``risam train`` reads them."""

from __future__ import annotations

from functools import partial

from risam_cli.settings import train
from risam_cli.weights.folder import stored_settings

load_settings = partial(train.load_settings, stored=stored_settings)
complete = partial(train.complete, stored=stored_settings)
