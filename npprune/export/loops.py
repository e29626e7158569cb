"""Whether an ONNX file repeats a part of itself, read off its bytes before anything runs it.

A loop may never end, and a network has none. Only the few fields of ONNX's protobuf messages that
lead to operators are looked at; weights are passed over, and no package is needed for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

_GRAPH, _FUNCTIONS = 7, 25  # of a model
_NODES, _FUNCTION_NODES = 1, 7
_OPERATOR, _ATTRIBUTE = 4, 5  # of a node
_SUBGRAPH, _SUBGRAPHS = 6, 11  # of an attribute
_DEPTH = 50
_CHOICE, _HIDDEN = b"If", b"SequenceMap"  # runs one graph once; is a loop by definition

Buffer = mmap.mmap | bytes
Span = tuple[int, int]


def repeated(path: Path) -> str | None:
    """The first operator that runs a part of the graph any number of times; None: there is none.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for field, span in _fields(data, (0, len(data))):
                if field == _GRAPH:
                    found = _in_nodes(data, span, _NODES, 0)
                elif field == _FUNCTIONS:
                    found = _in_nodes(data, span, _FUNCTION_NODES, 0)
                else:
                    continue
                if found is not None:
                    return found
        except IndexError as err:
            raise ValueError("it ends within a field") from err
    return None


def _in_nodes(data: Buffer, graph: Span, field: int, depth: int) -> str | None:
    if depth > _DEPTH:
        raise ValueError("graphs are nested too deeply")
    for number, node in _fields(data, graph):
        if number == field and (found := _in_node(data, node, depth)) is not None:
            return found
    return None


def _in_node(data: Buffer, node: Span, depth: int) -> str | None:
    operator, inner = b"", []
    for number, span in _fields(data, node):
        if number == _OPERATOR:
            operator = data[span[0] : span[1]]
        elif number == _ATTRIBUTE:
            inner += [s for n, s in _fields(data, span) if n in (_SUBGRAPH, _SUBGRAPHS)]
    if operator == _HIDDEN or (inner and operator != _CHOICE):
        return operator.decode("ascii", "backslashreplace") or "an operator without a name"
    for graph in inner:
        if (found := _in_nodes(data, graph, _NODES, depth + 1)) is not None:
            return found
    return None


def _fields(data: Buffer, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field of a message that has a length; others are passed over."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            yield key >> 3, (at, at + length)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
    if at > end:
        raise ValueError("a field is longer than what holds it")


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number of more than ten bytes")
