"""Servers of their own process for the tests of this folder, and the small model they serve.

Each mode of Serve needs its own environment before Ray starts, so a test runs a script and speaks
to it over the network only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

SHAPE, LABELS = (12, 10, 1), ("ant", "bee", "cat", "dog")
MODEL = "classifier"
INFER = f"/v2/models/{MODEL}/infer"


def model_bytes(seed: int = 0) -> bytes:
    """A linear classifier of images, as ONNX."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "flat"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = rng.normal(0, 0.003, (size, len(LABELS))).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *SHAPE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(LABELS)])],
        [
            helper.make_tensor("flat", TensorProto.INT64, [2], [-1, size]),
            helper.make_tensor("w", TensorProto.FLOAT, [size, len(LABELS)], weights.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def images(count: int, seed: int = 0) -> np.ndarray:
    """Random images the model takes."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def free_ports(count: int) -> list[str]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def started(folder: Path, script: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server's script while the context lasts; it must end well on SIGTERM.

    Args:
        folder: Holds the script and its log.
        script: Its text; it prints a line once it serves.
        words: Its arguments.
    """
    file = folder / "rayloop_test_server.py"
    file.write_text(script)
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    environment["PYTHONPATH"] = str(folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(file), *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            process.stdout.close()
            code = process.wait(60)
    assert code == 0, (folder / "log").read_text()[-3000:]


def first_line(folder: Path, process: subprocess.Popen[str]) -> list[str]:
    """The words a server says once it serves."""
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line, (folder / "log").read_text()[-3000:]
    return line
