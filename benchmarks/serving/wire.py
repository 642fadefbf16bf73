"""Turn images into whole HTTP requests as each server takes them best, and answers into arrays."""

import base64
import json
from typing import Literal

import numpy as np

Wire = Literal["v2", "raw", "v2-json", "v2-base64", "bento-json"]


def request_bytes(
    wire: Wire,
    port: int,
    shape: tuple[int, int, int],
    rows: int,
    seed: int,
    timeout_ms: float | None = None,
) -> bytes:
    """One request with `rows` noise images.

    Args:
        wire: How the server takes images.
        port: For the Host header.
        shape: Height, width, channels.
        rows: Images in it.
        seed: Which images.
        timeout_ms: Deadline in rayloop's header; other servers ignore it.
    """
    images = noise(shape, rows, seed)
    path, headers, body = ENCODERS[wire](images)
    headers["Content-Length"] = str(len(body))
    if timeout_ms is not None:
        headers["x-request-timeout-ms"] = f"{timeout_ms:.0f}"
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def noise(shape: tuple[int, int, int], rows: int, seed: int) -> np.ndarray:
    """Images uint8 (rows, H, W, C); the same ones for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def probabilities(wire: Wire, answer: bytes, classes: int) -> np.ndarray:
    """Probabilities (rows, classes) from a whole HTTP answer that was closed after its end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    if "chunked" in headers.get("transfer-encoding", ""):
        body = unchunk(body)
    if wire == "raw":
        return np.frombuffer(body, "<f4").reshape(-1, classes)
    if wire == "v2":
        start = int(headers["inference-header-content-length"])
        return np.frombuffer(body[start:], "<f4").reshape(-1, classes)
    document = json.loads(body)
    values = document if wire == "bento-json" else document["outputs"][0]["data"]
    return np.asarray(values, np.float32).reshape(-1, classes)


def unchunk(body: bytes) -> bytes:
    """The bytes of a chunked body."""
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)


Encoded = tuple[str, dict[str, str], bytes]
V2_PATH = "/v2/models/classifier/infer"


def _v2(images: np.ndarray) -> Encoded:
    tensor = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = _dump({"inputs": [tensor], "outputs": [wanted]})
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return V2_PATH, headers, head + images.tobytes()


def _raw(images: np.ndarray) -> Encoded:
    return "/infer", {"Content-Type": "application/octet-stream"}, images.tobytes()


def _v2_json(images: np.ndarray) -> Encoded:
    tensor = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
    }
    return V2_PATH, {"Content-Type": "application/json"}, _dump({"inputs": [tensor]})


def _v2_base64(images: np.ndarray) -> Encoded:
    data = [base64.b64encode(image.tobytes()).decode() for image in images]
    tensor = {
        "name": "image",
        "shape": [len(data), 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": data,
    }
    return V2_PATH, {"Content-Type": "application/json"}, _dump({"inputs": [tensor]})


def _bento_json(images: np.ndarray) -> Encoded:
    return "/infer", {"Content-Type": "application/json"}, _dump({"image": images.tolist()})


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


ENCODERS = {
    "v2": _v2, "raw": _raw, "v2-json": _v2_json, "v2-base64": _v2_base64, "bento-json": _bento_json,
}  # fmt: skip
