"""YAML from strangers: plain values only, and no more of them than the text has room for.

``yaml.safe_load`` builds no objects, but a few lines of aliases or merge keys stand for more values
than any machine holds, and tags on values that do not fit them raise whatever they like.
"""

from __future__ import annotations

from typing import Any

import yaml

from risam_cli.files.jsonlines import unique_pairs

MAX_VALUES = 1_000_000
"""Values, aliases written out, over which a text is refused."""


def load_yaml(text: str, *, unique: bool = False) -> Any:
    """The value of one YAML document.

    Args:
        unique: refuse a map that says two things under one key, of which the last would win.

    Raises:
        ValueError: it is no YAML, asks for objects, or stands for too many values; the message is
            one line.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        if unique and isinstance(node, yaml.MappingNode):
            unique_pairs((key.value, _said(value)) for key, value in node.value if _is_text(key))
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except _Odd as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        # Such as !!int "" or !!timestamp soon.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def _said(node: yaml.Node) -> str:
    """Equal for nodes that say the same."""
    return node.value if isinstance(node, yaml.ScalarNode) else yaml.serialize(node)


class _Odd(Exception):
    """A text of too many values, or one that holds itself."""


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values at and below a node, each alias counted as what it stands for."""
    known = sizes.get(id(node))
    if known == 0:
        raise _Odd("an alias stands for a value that holds it")
    if known is not None:
        return known
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            size += _count(child, sizes)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            size += sum(_count(child, sizes) for child in pair)
    if size > MAX_VALUES:
        raise _Odd(f"its aliases stand for more than {MAX_VALUES:,} values")
    sizes[id(node)] = size
    return size
