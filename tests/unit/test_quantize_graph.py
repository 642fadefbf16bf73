"""Rewrites of ONNX graphs leave the function as it was."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rayloop.quantize import graph
from rayloop.quantize.session import open_session

SHAPE = (2, 3, 6, 6)


def constant(name: str, values: object, dtype: type = np.float32) -> onnx.TensorProto:
    """A named constant."""
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def pooled(scales: tuple[float, float, float]) -> onnx.ModelProto:
    """Convolution, 2x2 maximum, batch norm with the given scales, ReLU."""
    weights = np.random.default_rng(0).normal(size=(3, 3, 3, 3))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["p", "s", "b", "m", "v"], ["n"], name="norm"),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    constants = [
        constant("w", weights),
        constant("s", scales),
        constant("b", [0.1, -0.2, 0.3]),
        constant("m", [0.5, -0.5, 0.0]),
        constant("v", [1.0, 2.0, 0.5]),
    ]
    body = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answers(model: onnx.ModelProto) -> np.ndarray:
    """What a model makes of fixed noise."""
    noise = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    result: np.ndarray = open_session(model.SerializeToString()).run(None, {"x": noise})[0]
    return result


def operators(model: onnx.ModelProto) -> list[str]:
    """Operator types in graph order."""
    return [node.op_type for node in model.graph.node]


def test_pooling_moves_behind_norm_and_relu() -> None:
    """With positive scales both operators move, and the answers stay."""
    model = pooled((1.0, 0.5, 2.0))
    before = answers(model)
    assert graph.swap_pooling(model) == 2
    assert operators(model) == ["Conv", "BatchNormalization", "Relu", "MaxPool"]
    np.testing.assert_allclose(answers(model), before, atol=1e-5)


def test_a_negative_scale_keeps_norm_where_it_is() -> None:
    """A falling function does not commute with a maximum."""
    model = pooled((1.0, -0.5, 2.0))
    before = answers(model)
    assert graph.swap_pooling(model) == 0
    np.testing.assert_array_equal(answers(model), before)


def test_names_shrink_and_answers_stay() -> None:
    """Inputs and outputs keep their names."""
    model = pooled((1.0, 1.0, 1.0))
    for node, name in ((model.graph.node[0], "output"), (model.graph.node[1], "input")):
        getattr(node, name)[0] = "the_output_of_the_first_convolution"
    before, size = answers(model), model.ByteSize()
    graph.strip(model)
    graph.shorten_names(model)
    np.testing.assert_array_equal(answers(model), before)
    assert model.ByteSize() < size
    assert [entry.name for entry in model.graph.output] == ["y"]


def test_layers_and_what_lies_outside_them() -> None:
    """Nodes after the last layer are outside; the layer itself is not."""
    model = pooled((1.0, 1.0, 1.0))
    assert graph.layer_names(model) == ["conv"]
    assert graph.outside_layers(model) == ["pool", "norm", "relu"]
    assert graph.weight_bytes(model) == 4 * (81 + 12)


@pytest.mark.parametrize(("zero_point", "inputs"), [(0, 2), (3, 3)])
def test_only_zero_points_that_are_zero_go(zero_point: int, inputs: int) -> None:
    """A zero point that matters stays."""
    node = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])
    body = helper.make_graph(
        [node],
        "dequantize",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [
            constant("q", [1, 5], np.int8),
            constant("scale", 0.5),
            constant("zero", zero_point, np.int8),
        ],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    graph.drop_zero_points(model)
    assert len(model.graph.node[0].input) == inputs
    assert ("zero" in {tensor.name for tensor in model.graph.initializer}) is (inputs == 3)
