"""HTML pages of one look: templates of a package, with the style sheet that all pages share."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def page_environment(package: str, *, autoescape: bool = True) -> Environment:
    """Templates in the folder ``templates`` of a package; ``style.css`` can be included.

    An undefined value is an error.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("risam_cli.drawing")]),
        autoescape=autoescape,
        undefined=StrictUndefined,
    )
