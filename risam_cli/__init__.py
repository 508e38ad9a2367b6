"""risam: referring image segmentation from the command line, and from Python.

::

    import risam_cli

    model = risam_cli.load()
    result = model.predict("photo.jpg", "the dog on the left")

Importing this package imports nothing heavy: torch comes with the first use of ``load``.
"""

from __future__ import annotations

import importlib

from risam_cli.version import __version__ as __version__

# As ``typing`` has it, which takes milliseconds to import: a Ctrl-C meanwhile prints a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from risam_cli.api.model import EncodedImage as EncodedImage
    from risam_cli.api.model import Model as Model
    from risam_cli.api.model import Result as Result
    from risam_cli.api.model import Results as Results
    from risam_cli.api.model import load as load

_API = ("EncodedImage", "Model", "Result", "Results", "load")


def __getattr__(name: str) -> object:
    """Imports the Python API when it is first asked for."""
    if name in _API:
        return getattr(importlib.import_module("risam_cli.api.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
