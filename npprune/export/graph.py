"""Make a traced ONNX graph readable and anonymous.

PyTorch's exporter writes stack traces, class names and the paths of the exporting machine into
the file, and calls values `val_123`. Here all of that goes, and every node is called after the
module it comes from: `blocks.3.mlp.fc1/MatMul`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import ExportError

if TYPE_CHECKING:
    import onnx

EXTERNAL_ABOVE = 2**31 - 2**20
"""Bytes of weights above which they go to a second file: protobuf's limit is 2 GiB."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(proto: onnx.ModelProto, parameters: set[str], *, prefix: str = "") -> None:
    """Rename and strip in place. `parameters`: the tensor names a reader knows (the state dict's);
    `prefix`: a wrapper's module name to drop, such as `model.`."""
    graph = proto.graph
    scopes = [_module(node, prefix) for node in graph.node]
    _strip(proto)
    fixed = {v.name for v in (*graph.input, *graph.output)}
    rename = _name_nodes(graph, scopes, fixed)
    _name_initializers(graph, rename, parameters, prefix)
    _apply(graph, rename)


def set_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the file's metadata by these keys and values."""
    del proto.metadata_props[:]
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def save(proto: onnx.ModelProto, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a graph as one file, or two above `external_above` bytes of weights, and check it.

    The file gets the IR version that came with its operator set, for the runtimes of that time.
    """
    import onnx

    operators = [o for o in proto.opset_import if not o.domain]
    found = onnx.helper.find_min_ir_version_for(operators, ignore_unknown=True)
    proto.ir_version = max(found, 8)  # of opset 17, the oldest written here
    size = sum(len(t.raw_data) for t in proto.graph.initializer)
    if size > external_above:
        data = path.name + ".data"
        (path.parent / data).unlink(missing_ok=True)  # onnx appends to an existing file
        onnx.save_model(proto, str(path), save_as_external_data=True, location=data)
    else:
        onnx.save_model(proto, str(path))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError(f"onnx.checker refused the exported graph: {err}") from err


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node after those it reads from, keeping the order otherwise."""
    from graphlib import TopologicalSorter

    maker = {name: i for i, node in enumerate(graph.node) for name in node.output}
    nodes = list(graph.node)
    sorter = TopologicalSorter(
        {i: [maker[x] for x in node.input if x in maker] for i, node in enumerate(nodes)}
    )
    sorter.prepare()
    order: list[int] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)


def _module(node: onnx.NodeProto, prefix: str) -> str:
    """The dotted module a traced node belongs to, "" at the top."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    names = ast.literal_eval(text)
    module = names[-2] if len(names) > 1 else ""
    if module.startswith("_"):  # the exporter's own book-keeping, no module
        return ""
    return str(module + ".").removeprefix(prefix).rstrip(".")


def _strip(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    del proto.metadata_props[:], graph.metadata_props[:]
    known = {t.name for t in graph.initializer}
    kept = [v for v in graph.value_info if v.name not in known]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
    entries: Iterator[Any] = _entries(graph)
    for entry in entries:
        entry.doc_string = ""
        del entry.metadata_props[:]


def _entries(graph: onnx.GraphProto) -> Iterator[Any]:
    yield from graph.node
    yield from graph.initializer
    yield from graph.value_info
    yield from graph.input
    yield from graph.output


def _name_nodes(graph: onnx.GraphProto, scopes: list[str], fixed: set[str]) -> dict[str, str]:
    """Name the nodes; returns the new names of the values they make."""
    rename: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node, module in zip(graph.node, scopes, strict=True):
        base = f"{module}/{node.op_type}" if module else node.op_type
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        outputs = [name for name in node.output if name]
        for i, name in enumerate(outputs):
            if name not in fixed:
                rename[name] = node.name if len(outputs) == 1 else f"{node.name}.{i}"
    return rename


def _name_initializers(
    graph: onnx.GraphProto, rename: dict[str, str], parameters: set[str], prefix: str
) -> None:
    """Parameters keep their names; a transposed weight is `<module>.weight_t`; a small constant is
    called by its value, and equal ones become one."""
    from onnx import numpy_helper

    users = {name: node for node in graph.node for name in node.input}
    kept: dict[str, Any] = {}
    for tensor in graph.initializer:
        bare = tensor.name.removeprefix(prefix)
        user = users.get(tensor.name)
        if bare in parameters:
            new = bare
        elif user is not None and user.op_type in ("MatMul", "Gemm") and len(tensor.dims) == 2:
            new = f"{user.name.rpartition('/')[0]}.weight_t".lstrip(".")
        else:
            new = _constant_name(numpy_helper.to_array(tensor), len(kept))
            while new in kept and not _equal(kept[new], tensor):
                new += "_"
            if new in kept:
                rename[tensor.name] = new
                continue
        while new in kept:
            new += "_"
        rename[tensor.name] = new
        kept[new] = tensor
    tensors = list(kept.values())
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _equal(a: onnx.TensorProto, b: onnx.TensorProto) -> bool:
    return a.data_type == b.data_type and a.dims == b.dims and bool(a.raw_data == b.raw_data)


def _constant_name(value: Any, number: int) -> str:
    if value.size > 8:
        return f"const.{value.dtype}.{number}"
    text = "_".join(f"{v:g}" for v in value.ravel().tolist())
    return f"const.{value.dtype}.{'scalar.' if value.ndim == 0 else ''}{text or 'empty'}"


def _apply(graph: onnx.GraphProto, rename: dict[str, str]) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = rename.get(name, name)
    for tensor in graph.initializer:
        tensor.name = rename.get(tensor.name, tensor.name)
    for info in graph.value_info:
        info.name = rename.get(info.name, info.name)
