"""HTML pages of one look: templates of a package, with the style sheet that all pages share."""

from __future__ import annotations

import re

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from risam_cli.console.text import sanitize

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def page_environment(package: str, *, autoescape: bool = True) -> Environment:
    """Templates in the folder ``templates`` of a package; ``style.css`` can be included.

    An undefined value is an error. Control characters in values, which a terminal would obey, are
    written as escapes.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("risam_cli.drawing")]),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=_plain,
    )


def _plain(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup) and _CONTROL.search(value):
        return _CONTROL.sub(lambda found: sanitize(found[0]), value)
    return value
