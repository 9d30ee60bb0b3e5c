"""YAML that a stranger may have written: no key twice, no nest without end, no text that grows when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from remend.errors import FileError, InputError, shortened
from remend.files.reading import read_text

DEEPEST, LARGEST = 50, 100_000
"""Levels of lists and mappings, and values in all, each counted as often as it is referred to."""

MOST_CHARACTERS = 2**21
"""Of a file; PyYAML reads about a million a second."""


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no more of them than a settings file has."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See PyYAML; here nodes are counted before anything is made of them."""
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"lists and mappings are nested more than {DEEPEST} deep")
        refers = self.check_event(yaml.AliasEvent)  # to a node that may not be whole yet
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not refers:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
            size = 1 + sum(self._sizes.get(id(part), LARGEST) for part in inner)  # what is not known refers to itself
            if size > LARGEST:
                raise yaml.YAMLError(f"its references (*name) stand for more than {LARGEST} values, or for themselves")
            self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML, which lets the last of several values count."""
        first: dict[object, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag == "tag:yaml.org,2002:bool":  # YAML 1.1 reads on, off, yes and no so; as keys they are words
                key.tag = "tag:yaml.org,2002:str"
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in first:
                raise yaml.YAMLError(f'the key "{shortened(name, 60)}" stands in line {first[name]} and in line {line}')
            first[name] = line
        return super().construct_mapping(node, deep)


def yaml_of(text: str) -> Any:
    """The value of a YAML text, plain types alone.

    Raises InputError with what is wrong: it is no YAML, has a key twice, is nested too deeply, or its references grow.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise InputError(f"it has {len(text)} characters, and {MOST_CHARACTERS} are the most that is read")
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(shortened(error, 400)) from None
    except Exception as error:  # of what a tag or an impossible date, number or letter makes PyYAML do
        raise InputError(f"a value in it can't be made: {shortened(error, 400)}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises FileError or InputError with the path and what is wrong."""
    path = Path(path)
    try:
        text = read_text(path)
    except FileError as error:
        raise FileError(f"recipe {error}") from None
    try:
        values = yaml_of(text)
    except InputError as error:
        raise InputError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(
            f"recipe {path} must be a mapping of keys to values, e.g. 'steps: 60'; it holds {type(values).__name__}"
        )
    return values
