"""YAML as plain data, with the place of every value: a message can then say file:line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from npprune.errors import RecipeError
from npprune.recipe.messages import Place, show

_MERGE = "tag:yaml.org,2002:merge"
_MAX_NODES = 100_000  # aliases of aliases grow without bound


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, and `no`, `on`, `1:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the base class has it so)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or another YAML reader would take for something else."""


_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(path: Path) -> tuple[dict[str, Any], dict[Place, str]]:
    """A recipe file as plain data, and the place (file:line) of every value in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise RecipeError(f"cannot read `{path}`: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise RecipeError(f"cannot read `{path}`: it is not UTF-8 text") from err
    places: dict[Place, str] = {}
    data = _Builder(str(path), places).build(text)
    if not isinstance(data, dict):
        what = "nothing" if data is None else show(data)
        raise RecipeError(
            f"a recipe must be a mapping of sections, got {what} ({path}:1)",
            hint="it begins with `name:` and `model:`",
        )
    return data, places


class _Builder:
    """Turns YAML nodes into data and notes where each value came from."""

    def __init__(self, source: str, places: dict[Place, str], numbered: bool = True) -> None:
        self.source, self.places, self.numbered = source, places, numbered
        self.open: list[yaml.Node] = []
        self.nodes = 0

    def build(self, text: str, path: Place = ()) -> Any:
        try:
            self.loader = _Loader(text)
            node = self.loader.get_single_node()
            return None if node is None else self._value(node, path)
        except yaml.MarkedYAMLError as err:
            mark = err.problem_mark or err.context_mark
            where = self._at(mark.line) if mark else self.source
            raise RecipeError(f"not valid YAML: {err.problem or err.context} ({where})") from err
        except (yaml.YAMLError, ValueError) as err:  # unprintable characters, absurd numbers
            reason = getattr(err, "reason", None) or err
            raise RecipeError(f"not valid YAML: {reason} ({self.source})") from err
        except RecursionError as err:
            raise RecipeError(f"not valid YAML: nested too deeply ({self.source})") from err

    def _at(self, line: int) -> str:
        return f"{self.source}:{line + 1}" if self.numbered else self.source

    def _value(self, node: yaml.Node, path: Place) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES or node in self.open:
            raise RecipeError(
                f"aliases must not contain themselves or grow without bound "
                f"({self._at(node.start_mark.line)})"
            )
        self.places.setdefault(path, self._at(node.start_mark.line))
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._value(child, (*path, i)) for i, child in enumerate(node.value)]
            return self.loader.construct_object(node)
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Place) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        # what is merged comes first: the mapping's own keys then win, their places too
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            line = key_node.start_mark.line
            if key_node.tag == _MERGE:
                merged = {**self._merge(value_node, path), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"a key must be text ({self._at(line)})")
            key = key_node.value
            name = ".".join(map(str, (*path, key)))
            if key in lines:
                raise RecipeError(
                    f"duplicate key `{name}`: it is already in line {lines[key] + 1} "
                    f"({self._at(line)})",
                    hint="leave one of the two out",
                )
            lines[key] = line
            self.places[(*path, key)] = self._at(line)
            data[key] = self._value(value_node, (*path, key))
        return {**merged, **data}

    def _merge(self, node: yaml.Node, path: Place) -> dict[str, Any]:
        """What `<<: *anchor` or `<<: [*a, *b]` brings in; the mapping's own keys win."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise RecipeError(
                    f"`<<` must name a mapping or a list of mappings "
                    f"({self._at(node.start_mark.line)})"
                )
            merged = {**self._value(part, path), **merged}
        return merged


def override(data: dict[str, Any], places: dict[Place, str], text: str) -> None:
    """Apply one `a.b=c` to the data; c is YAML."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    source = f"--set {text}"
    if not equals or not all(path):
        raise RecipeError(
            f"`--set` must be KEY=VALUE, got `{text}`", hint="for example `--set prune.keep=0.5`"
        )
    section: Any = data
    for i, part in enumerate(path[:-1]):
        if section.get(part) is None:
            section[part] = {}
            places[path[: i + 1]] = source
        section = section[part]
        if not isinstance(section, dict):
            name = ".".join(path[: i + 1])
            raise RecipeError(f"`{name}` is a value, not a section ({source})")
    for place in [p for p in places if p[: len(path)] == path]:
        del places[place]
    places[path] = source
    section[path[-1]] = _Builder(source, places, numbered=False).build(value, path)


def dump(data: dict[str, Any]) -> str:
    """Plain data as YAML, in the order of its keys."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
