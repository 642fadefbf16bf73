"""The pure decisions of serving: admission, traffic, verdicts, options, and the engine's checks."""

import io

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rayloop.config import ServeConfig
from rayloop.errors import ConfigError, Corrupt
from rayloop.serve.admission import ADMIT, Limits, Refuse, admit, admit_bytes
from rayloop.serve.assemble import GOLDEN_TOLERANCE, prove
from rayloop.serve.engine import OnnxEngine, warm_up_sizes
from rayloop.serve.options import deployment_options, failure_reason, target_ongoing_requests

LIMITS = Limits(max_body_bytes=100, max_queued_rows=10)


def tiny_model(input_type: int = TensorProto.UINT8, name: str = "image") -> bytes:
    """[N, 2, 2, 1] -> softmax over the two columns of pixels."""
    nodes = [
        helper.make_node("Cast", [name], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "flat"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32) / 100
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, input_type, ["N", 2, 2, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2])],
        [
            helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 4]),
            helper.make_tensor("w", TensorProto.FLOAT, [4, 2], weights.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("queued", "inflight", "length", "status"),
    [
        (0, 0, None, None),
        (9, 300, "100", None),
        (0, 0, "101", 413),
        (10, 0, "1", 429),
        (10, 0, "101", 413),
        (0, 301, "100", 429),
        (0, 0, "-1", 400),
        (0, 0, "1e2", 400),
        (0, 0, "", 400),
        (0, 0, "9" * 30, 400),
    ],
)
def test_admission_by_headers(queued: int, inflight: int, length: str | None, status) -> None:
    decision = admit(LIMITS, queued_rows=queued, inflight_bytes=inflight, content_length=length)
    if status is None:
        assert decision is ADMIT
    else:
        assert isinstance(decision, Refuse)
        assert decision.status == status
        assert (decision.retry_after_s > 0) == (status == 429)


def test_bodies_held_at_once_are_bounded() -> None:
    assert admit_bytes(LIMITS, LIMITS.max_inflight_bytes) is ADMIT
    assert isinstance(admit_bytes(LIMITS, LIMITS.max_inflight_bytes + 1), Refuse)


def test_options_follow_the_settings() -> None:
    fixed = deployment_options(ServeConfig(min_replicas=3, max_replicas=3, cpus_per_replica=2))
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 2}
    config = ServeConfig(min_replicas=1, max_replicas=4)
    scaled = deployment_options(config)
    assert scaled["autoscaling_config"]["max_replicas"] == 4
    assert "num_replicas" not in scaled
    assert scaled["max_ongoing_requests"] > config.max_queued_rows
    assert target_ongoing_requests(config) < scaled["max_ongoing_requests"]


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_rows_per_request=64"):
        deployment_options(ServeConfig(max_rows_per_request=64, max_queued_rows=32))
    with pytest.raises(ConfigError, match="max_batch_wait_ms"):
        deployment_options(ServeConfig(max_batch_wait_ms=50, default_timeout_ms=50))


def test_warm_up_covers_the_powers_of_two_and_the_largest() -> None:
    assert warm_up_sizes(1) == (1,)
    assert warm_up_sizes(32) == (1, 2, 4, 8, 16, 32)
    assert warm_up_sizes(20) == (1, 2, 4, 8, 16, 20)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_row_gets_the_same_bits_in_every_batch(sizes: list[int], seed: int) -> None:
    engine = OnnxEngine(tiny_model())
    images = np.random.default_rng(seed).integers(0, 256, (sum(sizes), 2, 2, 1), np.uint8)
    solo = np.concatenate([engine.predict(row[None]) for row in images])
    joint = np.concatenate(
        [engine.predict(part) for part in np.split(images, np.cumsum(sizes)[:-1])]
    )
    np.testing.assert_array_equal(joint, solo)


def test_a_model_of_another_kind_is_refused() -> None:
    engine = OnnxEngine(tiny_model())
    assert engine.shape == (2, 2, 1)
    for broken in (b"", b"garbage", tiny_model()[:-40]):
        with pytest.raises(Corrupt, match="export and register"):
            OnnxEngine(broken)
    with pytest.raises(Corrupt, match="uint8 input 'image'"):
        OnnxEngine(tiny_model(TensorProto.FLOAT))
    with pytest.raises(Corrupt, match="picture"):
        OnnxEngine(tiny_model(name="picture"))


def golden(images: np.ndarray, probabilities: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=images, probabilities=probabilities)
    return buffer.getvalue()


def test_golden_rows_must_be_reproduced() -> None:
    engine = OnnxEngine(tiny_model())
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    recorded = engine.predict(images)
    assert prove(engine, golden(images, recorded), "here") == 0.0
    for wrong in (recorded + 2 * GOLDEN_TOLERANCE, recorded[:, :1], recorded * np.nan):
        with pytest.raises(Corrupt, match="golden rows"):
            prove(engine, golden(images, wrong), "here")


def test_a_failed_deployment_is_told_in_one_sentence() -> None:
    report = (
        "The deployment failed to start 3 times in a row.\nTraceback ...\n"
        "rayloop.errors.Corrupt: the golden rows differ by 0.1."
    )
    assert failure_reason(report) == "the golden rows differ by 0.1."
    assert failure_reason(" out of memory ") == "out of memory"
