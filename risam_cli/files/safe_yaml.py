"""YAML from strangers: plain values only, and no more of them than the text has room for.

``yaml.safe_load`` builds no objects, but a few lines of aliases or merge keys stand for more values
than any machine holds, and tags on values that do not fit them raise whatever they like.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        for one in _maps(node) if unique else ():
            pairs = [(key.value, value) for key, value in one.value if _is_text(key)]
            if len(dict(pairs)) < len(pairs):
                unique_pairs((key, _said(value)) for key, value in pairs)
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


def _maps(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """All maps at and below a node, each once."""
    todo, known = [node], {id(node)}
    while todo:
        one = todo.pop()
        if isinstance(one, yaml.MappingNode):
            yield one
        if isinstance(one, yaml.CollectionNode):
            inner = [child for item in one.value for child in _parts(item)]
            todo += [child for child in inner if id(child) not in known]
            known |= {id(child) for child in inner}


def _parts(item: Any) -> tuple[yaml.Node, ...]:
    return item if isinstance(item, tuple) else (item,)


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
