"""Random seeds -> requests that are wrong in one or several ways, as bytes for HTTP and gRPC."""

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

from rayloop.serve.protocol import inference_pb2 as pb
from tests.cluster.servers import INFER, MODEL, SHAPE, images

METHODS = (
    "ModelInfer", "ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics",
    "RepositoryIndex", "ServerMetadata", "ServerLive", "SystemSharedMemoryStatus", "TraceSetting",
)  # fmt: skip
PATHS = (
    INFER, INFER, INFER, INFER, f"/v2/models/{MODEL}/versions/3/infer", "/predict", "/", "/v2",
    f"/v2/models/{MODEL}", "/v2/models/other/infer", f"/v2/models/{MODEL}/versions/x/infer",
    "/v2/repository/index", "/v2/models//infer", "/v2/../v2", "/%00", "/%ff%fe", "/v2/" + "a" * 900,
    "/-/nothing", "/v2/systemsharedmemory/status", "/v2/models/" + "%2e%2e%2f" * 9, "*", "//",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 256, 1.5, 1e400, -1e400, 2**63, 10**40, "", "image", "\x00", "🙂", [], {},
    [[]], [None], {"a": {}}, "NaN",
)  # fmt: skip


def document(chance: random.Random) -> dict[str, Any]:
    """A good infer request of one or two rows, as JSON."""
    batch = images(chance.randint(1, 2), chance.randrange(1000))
    tensor = {"name": "image", "shape": list(batch.shape), "datatype": "UINT8"}
    return {
        "id": "x",
        "parameters": {"priority": 2},
        "inputs": [{**tensor, "data": batch.ravel().tolist(), "parameters": {}}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 0}}],
    }


def spoil(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place of it replaced, removed or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        how = chance.random()
        if how < 0.15:
            return {name: kept for name, kept in value.items() if name != key}
        if how < 0.25:
            return {**value, chance.choice(["extra", "", "__proto__", key * 300]): value[key]}
        return {**value, key: spoil(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        if chance.random() < 0.3:
            return value[:place] if chance.random() < 0.5 else value + value[place:]
        return [*value[:place], spoil(value[place], chance), *value[place + 1 :]]
    return chance.choice(VALUES)


def garble(data: bytes, chance: random.Random) -> bytes:
    """Bytes cut short, with some changed, or with others put in."""
    if not data:
        return chance.randbytes(20)
    place = chance.randrange(len(data))
    how = chance.randrange(4)
    if how == 0:
        return data[:place]
    if how == 1:
        spot = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            spot[chance.randrange(len(spot))] = chance.randrange(256)
        return bytes(spot)
    if how == 2:
        return data[:place] + chance.randbytes(chance.randint(1, 40)) + data[place:]
    return data[place:] + data[:place]


def bad_body(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body with the headers that describe it, more or less."""
    headers: dict[str, str] = {}
    good = document(chance)
    text = json.dumps(good).encode()
    makers: list[Callable[[], bytes]] = [
        lambda: json.dumps(spoil(good, chance)).encode(),
        lambda: json.dumps(spoil(good, chance)).encode(),
        lambda: json.dumps(spoil(spoil(good, chance), chance)).encode(),
        lambda: garble(text, chance),
        lambda: chance.randbytes(chance.randint(0, 2000)),
        lambda: b"[" * chance.randint(1, 50_000),
        lambda: b'{"inputs":' * 400 + b"1" + b"}" * 400,
        lambda: text.replace(b"image", b"image\\ud800"),
        lambda: b'{"inputs":[{"name":"image","shape":[1e3],"data":[' + b"1," * 9000 + b"1]}]}",
        lambda: binary(good, chance, headers),
        lambda: binary(good, chance, headers),
        lambda: packed(text, chance, headers),
        lambda: text,
    ]
    return chance.choice(makers)(), headers


def binary(good: dict[str, Any], chance: random.Random, headers: dict[str, str]) -> bytes:
    """A binary request whose sizes do not fit."""
    (tensor,) = good["inputs"]
    raw = bytes(tensor.pop("data"))
    tensor["parameters"] = {"binary_data_size": chance.choice([len(raw), len(raw) - 1, -5, "9"])}
    if chance.random() < 0.3:
        tensor |= {"datatype": "BYTES", "shape": [chance.choice([0, 1, 2, 2**40])]}
    head = json.dumps(good).encode()
    length = chance.choice([len(head), len(head) + 1, 0, 10**9, -1, "x", len(head) - 3])
    headers["Inference-Header-Content-Length"] = str(length)
    return head + (raw if chance.random() < 0.6 else garble(raw, chance))


def packed(text: bytes, chance: random.Random, headers: dict[str, str]) -> bytes:
    """A compressed body, damaged, bursting, or named wrongly."""
    headers["Content-Encoding"] = chance.choice(["gzip", "deflate", "br", "gzip, gzip", "GZIP", ""])
    content = gzip.compress(bytes(2_000_000) if chance.random() < 0.2 else text)
    return content if chance.random() < 0.5 else garble(content, chance)


def bad_http(chance: random.Random) -> bytes:
    """All bytes that a client sends on a connection before it closes its side."""
    body, headers = bad_body(chance)
    method = chance.choice(["POST"] * 9 + ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "X"])
    headers["Host"] = "localhost"
    if chance.random() < 0.1:
        headers["x-request-timeout-ms"] = chance.choice(["1", "0", "-3", "x", "1e9", "nan", "inf"])
    if chance.random() < 0.1:
        headers["x-rayloop-variant"] = chance.choice(["champion", "nobody", "\xe9" * 50])
    if chance.random() < 0.1:
        headers["Content-Type"] = chance.choice(
            ["multipart/form-data", "multipart/form-data; boundary=", "text/html", "a/b;" * 200]
        )
    if chance.random() < 0.15:
        size = chance.choice([len(body) + 1, len(body) - 1, "x", -1, 10**12, "1, 1"])
    else:
        size = len(body)
    headers["Content-Length"] = str(size)
    if chance.random() < 0.08:
        del headers["Content-Length"]
        headers["Transfer-Encoding"] = chance.choice(["chunked", "chunked, chunked", "identity"])
        body = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        body = body if chance.random() < 0.5 else garble(body, chance)
    lines = [f"{method} {chance.choice(PATHS)} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    wire = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    if chance.random() < 0.06:
        wire = garble(wire, chance)
    return wire + body


def bad_message(chance: random.Random) -> tuple[str, bytes]:
    """A method, and the bytes of a message that is not what the method wants."""
    name = chance.choice(METHODS)
    if name != "ModelInfer" and chance.random() < 0.7:
        name = "ModelInfer"
    if name != "ModelInfer":
        request = getattr(pb, f"{name}Request")()
        if chance.random() < 0.5:
            return name, request.SerializeToString()
        return name, chance.randbytes(chance.randint(0, 60))
    message = pb.ModelInferRequest(model_name=MODEL, id="x")
    rows = chance.randint(1, 3)
    tensor = message.inputs.add(name="image", datatype="UINT8", shape=[rows, *SHAPE])
    raw = images(rows).tobytes()
    how = chance.randrange(9)
    if how == 0:
        message.model_name = chance.choice(["", "other", "é" * 100])
    elif how == 1:
        tensor.shape[chance.randrange(4)] = chance.choice([0, -1, 2**62, 5])
    elif how == 2:
        tensor.datatype = chance.choice(["", "FP32", "BYTES", "uint8"])
    elif how == 3:
        tensor.contents.uint_contents.extend([1, 300, 7])
    elif how == 4:
        message.inputs.add(name="image")
    elif how == 5:
        message.parameters["priority"].int64_param = chance.choice([-1, 99, 2**60])
    elif how == 6:
        message.outputs.add(name=chance.choice(["", "nothing", "probabilities"]))
    elif how == 7:
        message.model_version = chance.choice(["9", "x", "3"])
    if chance.random() < 0.9:
        message.raw_input_contents.append(raw if chance.random() < 0.7 else garble(raw, chance))
    data = message.SerializeToString()
    return name, data if chance.random() < 0.6 else garble(data, chance)
