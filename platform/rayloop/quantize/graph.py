"""An ONNX graph -> the same function in a form that quantizes better, and smaller on disk."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import numpy_helper

WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that hold the weights and nearly all of the arithmetic."""

PRODUCTS = ("Gemm", "MatMul")


def swap_pooling(model: onnx.ModelProto) -> int:
    """Move monotone operators before the maximum pooling that feeds them; the function is equal.

    A maximum commutes with everything that never falls: a ReLU, and a batch norm whose scales are
    all positive. Moved, they fold into the convolution before the pooling and cost nothing.

    Returns:
        How many operators were moved.
    """
    moved = 0
    while _swap_one(model.graph):
        moved += 1
    return moved


def _swap_one(graph: onnx.GraphProto) -> bool:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in graph.node:
        pool = makers.get(node.input[0]) if node.input else None
        if pool is None or pool.op_type != "MaxPool" or len(pool.output) != 1:
            continue
        if readers[pool.output[0]] != 1 or not _is_monotone(node, constants):
            continue
        before, between, after = pool.input[0], pool.output[0], node.output[0]
        node.input[0], node.output[0] = before, between
        pool.input[0], pool.output[0] = between, after
        _put_before(graph, node, pool)
        return True
    return False


def _is_monotone(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type == "Relu":
        return True
    if node.op_type != "BatchNormalization" or node.input[1] not in constants:
        return False
    return bool((numpy_helper.to_array(constants[node.input[1]]) > 0).all())


def _put_before(graph: onnx.GraphProto, node: onnx.NodeProto, other: onnx.NodeProto) -> None:
    nodes = [entry for entry in graph.node if entry is not node]
    at = next(index for index, entry in enumerate(nodes) if entry is other)
    copies = [onnx.NodeProto.FromString(entry.SerializeToString()) for entry in nodes]
    copies.insert(at, onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(copies)


def strip(model: onnx.ModelProto) -> None:
    """Remove what running does not need: stack traces of the export, comments, shapes inside."""
    graph = model.graph
    named: Iterable[onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto] = (
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.initializer,
    )
    for entry in named:
        del entry.metadata_props[:]
        entry.doc_string = ""
    del graph.metadata_props[:]
    del model.metadata_props[:]
    del graph.value_info[:]
    used = {node.domain for node in graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def shorten_names(model: onnx.ModelProto) -> None:
    """Give inner tensors names of a few letters and nodes none.

    In a small INT8 model the names are a tenth of the file.
    """
    graph = model.graph
    kept = {entry.name for entry in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""}
    for name in (
        *(tensor.name for tensor in graph.initializer),
        *(name for node in graph.node for name in (*node.input, *node.output)),
    ):
        if name not in short:
            short[name] = name if name in kept else f"t{len(short)}"
    for tensor in graph.initializer:
        tensor.name = short[tensor.name]
    for node in graph.node:
        node.name = ""
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short[name] for name in node.output]


def drop_zero_points(model: onnx.ModelProto) -> None:
    """Remove the zero points of signed constants that are all zero and may be left out.

    Those that feed matrix products stay: without them ONNX Runtime 1.31 does not fuse the product
    into integer arithmetic, and an answer then depends on its batch in the last bit.
    """
    graph = model.graph
    products = {name for node in graph.node if node.op_type in PRODUCTS for name in node.input}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        if node.output[0] in products:
            continue
        if node.input[0] in constants and node.input[2] in constants:
            zero_point = numpy_helper.to_array(constants[node.input[2]])
            if zero_point.dtype in (np.int8, np.int32) and not zero_point.any():
                del node.input[2]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def layer_names(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that hold constant weights, in graph order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in WEIGHT_OPS and constants.intersection(node.input[1:])
    ]


def outside_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes before every weight layer or after all of them.

    Preprocessing, softmax and the scaling of logits stay in fp32: they cost little, and an error
    there reaches every answer.
    """
    graph, layers = model.graph, set(layer_names(model))
    after_a_layer: set[str] = set()
    downstream: set[str] = set()
    for node in graph.node:
        if node.name in layers or after_a_layer.intersection(node.input):
            after_a_layer.update(node.output)
            downstream.add(node.name)
    before_a_layer: set[str] = set()
    upstream: set[str] = set()
    for node in reversed(graph.node):
        if node.name in layers or before_a_layer.intersection(node.output):
            before_a_layer.update(node.input)
            upstream.add(node.name)
    inner = downstream & upstream
    return [node.name for node in graph.node if node.name not in inner]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants in the graph."""
    return sum(
        int(np.prod(tensor.dims, dtype=np.int64))
        * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )
