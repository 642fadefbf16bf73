"""Embeddings: the input of the last linear layer of the graph that is served, fp32 and INT8."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from rayloop.config import ModelConfig
from rayloop.errors import Corrupt, RequestError
from rayloop.models.zoo import build_classifier
from rayloop.quantize.export import export_onnx
from rayloop.quantize.methods import StaticQuantizer, make_small, write_dynamic
from rayloop.serve.events.embedding import Embedder
from tests.cluster import servers

IMAGES = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), dtype=np.uint8)


def test_of_a_linear_model_the_embedding_is_its_pixels() -> None:
    embedder = Embedder(servers.model_bytes())
    images = servers.images(130)
    found = embedder.embed(images)
    assert found.dtype == np.float32
    assert embedder.width == images[0].size
    assert np.array_equal(found, images.reshape(130, -1))
    assert embedder.embed(images[:0]).shape == (0, embedder.width)


@pytest.mark.parametrize("name", ["fastnet", "tiny_resnet"])
def test_of_an_exported_network_it_is_what_its_head_gets(name: str, tmp_path: Path) -> None:
    config = ModelConfig(name=name, widths=(8, 16))
    model = build_classifier(config, (8, 8, 1), 10, (0.3,), (0.37,), seed=0).eval()
    fp32, int8, dynamic = (tmp_path / f"{kind}.onnx" for kind in ("fp32", "int8", "dynamic"))
    export_onnx(model, fp32)
    StaticQuantizer(fp32=fp32, rows=IMAGES, reduce_range=True, cache=tmp_path / "ranges").write(
        int8
    )
    write_dynamic(fp32, dynamic, reduce_range=True)
    make_small(fp32)

    taken: list[torch.Tensor] = []
    head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.inference_mode():
        model(torch.from_numpy(IMAGES))
    wanted = taken[0].numpy()
    assert wanted.shape == (150, 16)
    for file, tolerance in ((fp32, 1e-4), (dynamic, 1e-4), (int8, 0.15)):
        found = Embedder(file.read_bytes(), num_threads=2).embed(IMAGES)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), file.name
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(int8).graph.node}


def graph_bytes(nodes: list[onnx.NodeProto], output: list[int | str]) -> bytes:
    """A model of 4x4 grey images whose middle is given."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT), *nodes],
        "made",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 4, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, output)],
        [helper.make_tensor("w", TensorProto.FLOAT, [1, 3], [1.0, 2.0, 3.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def test_a_model_without_a_linear_layer_is_told() -> None:
    nodes = [helper.make_node("ReduceMean", ["f"], ["probabilities"], axes=[1, 2], keepdims=0)]
    with pytest.raises(RequestError, match="no linear layer .*events.embedding_share to 0"):
        Embedder(graph_bytes(nodes, ["N", 1]))


def test_a_linear_layer_that_takes_more_than_a_vector_is_told() -> None:
    nodes = [
        helper.make_node("MatMul", ["f", "w"], ["wide"]),
        helper.make_node("ReduceMean", ["wide"], ["probabilities"], axes=[1, 2], keepdims=0),
    ]
    with pytest.raises(RequestError, match=r"takes 'f', float32 \[2, 4, 4, 1\] for two images"):
        Embedder(graph_bytes(nodes, ["N", 3]))


def test_a_linear_layer_beside_the_way_to_the_answer_is_not_taken() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["f"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["logits"]),
        helper.make_node("Mul", ["logits", "logits"], ["more"]),
        helper.make_node("Softmax", ["more"], ["probabilities"]),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["logits", "wt"], ["unused"]),
    ]
    found = Embedder(graph_bytes(nodes, ["N", 3])).embed(IMAGES[:, :4, :4])
    np.testing.assert_allclose(found[:, 0], IMAGES[:, :4, :4].mean(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08"])
def test_bytes_that_are_no_model_are_told(content: bytes) -> None:
    with pytest.raises(Corrupt, match="export and register it again"):
        Embedder(content)


def test_a_graph_that_cannot_run_is_told() -> None:
    nodes = [
        helper.make_node("Reshape", ["f", "missing"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["probabilities"]),
    ]
    with pytest.raises(Corrupt, match="cannot compute embeddings"):
        Embedder(graph_bytes(nodes, ["N", 3]))
