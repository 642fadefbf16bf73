"""The HTTP face, spoken to as ASGI: every route, every header, every error as JSON."""

import asyncio
import gzip
import io
import json
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from rayloop.config import ServeConfig
from rayloop.serve.assemble import make_service
from rayloop.serve.client import infer_body, read_answer
from rayloop.serve.http import InferenceApp
from rayloop.serve.protocol.spec import ModelSpec

SPEC = ModelSpec(model="classifier", version="7", shape=(4, 3, 1), class_names=("low", "high"))
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 4, 3, 1)
CONFIG = ServeConfig(max_body_bytes=20_000, max_rows_per_request=8, max_queued_rows=32)


class BrightnessEngine:
    """The brighter, the likelier `high`; breaks on an image that starts with 255."""

    def __init__(self) -> None:
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.door.wait(10)
        if (images[:, 0, 0, 0] == 255).any():
            raise ValueError("too bright")
        high = images.reshape(len(images), -1).mean(1, dtype=np.float64) / 255
        return np.stack([1 - high, high], 1).astype(np.float32)

    def warm(self, batch_sizes) -> None:
        self.predict(IMAGES)


class Reply:
    def __init__(self, messages: list[dict]) -> None:
        start, body = messages
        self.status: int = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body: bytes = body["body"]

    def json(self) -> dict:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


class Remembers:
    """A memory that is a list."""

    writer = "0123456789abcdef"

    def __init__(self, events: list) -> None:
        self.put = events.append

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def request(
    method: str,
    path: str,
    body: bytes | list[bytes] = b"",
    headers: dict[str, str] | None = None,
    engine: BrightnessEngine | None = None,
    config: ServeConfig = CONFIG,
    events: list | None = None,
) -> Reply:
    async def main() -> Reply:
        service = make_service(
            engine or BrightnessEngine(),
            SPEC,
            config,
            Remembers(events) if events is not None else None,
        )
        reply = await call(InferenceApp(service, config), method, path, body, headers)
        await service.close()
        return reply

    return asyncio.run(main())


async def call(app, method: str, path: str, body=b"", headers=None) -> Reply:
    chunks = [body] if isinstance(body, bytes) else body
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
        for index, chunk in enumerate(chunks)
    ]
    sent: list[dict] = []

    async def receive() -> dict:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": ""}
    await app(scope, receive, send)
    return Reply(sent)


def infer(images: np.ndarray = IMAGES, headers: dict[str, str] | None = None, **more) -> Reply:
    body, head = infer_body(images)
    sent = {"Inference-Header-Content-Length": str(head), **(headers or {})}
    return request("POST", "/v2/models/classifier/infer", body, sent, **more)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_documents_and_health_of_the_protocol() -> None:
    assert "binary_tensor_data" in request("GET", "/v2").json()["extensions"]
    for path in ("/v2/models/classifier", "/v2/models/classifier/versions/7"):
        assert request("GET", path).json()["versions"] == ["7"]
        assert request("GET", f"{path}/ready").status == 200
    assert request("GET", "/v2/health/live").status == 200
    assert request("GET", "/v2/health/ready").status == 200
    assert request("HEAD", "/v2/health/ready").body == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v3", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/classifier/versions/8", 404),
        ("GET", "/v2/models/classifier/versions", 404),
        ("GET", "/v2/models/classifier/nothing", 404),
        ("GET", "/v2/models/classifier/", 404),
        ("GET", "/v2/models/classifier/ready/more", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/classifier/infer", 405),
        ("DELETE", "/v2/models/classifier", 405),
        ("GET", "/predict", 405),
        ("POST", "/v2/health/live", 405),
        ("BREW", "/predict", 405),
    ],
)
def test_unknown_paths_and_methods_are_errors_as_json(method: str, path: str, status: int) -> None:
    reply = request(method, path)
    assert reply.status == status
    assert reply.json()["error"]


def test_infer_answers_in_binary_and_in_json_with_the_same_bits() -> None:
    binary = infer()
    assert binary.headers["content-type"] == "application/octet-stream"
    probabilities = read_answer(binary.body, int(binary.headers["inference-header-content-length"]))
    tensor = {"name": "image", "shape": [2, 4, 3, 1], "datatype": "UINT8", "data": IMAGES.tolist()}
    body = json.dumps({"id": "a", "inputs": [tensor]}).encode()
    text = request("POST", "/v2/models/classifier/versions/7/infer", body)
    document = text.json()
    assert document["id"] == "a"
    values = np.float32(document["outputs"][0]["data"]).reshape(2, 2)
    np.testing.assert_array_equal(values, probabilities)
    np.testing.assert_array_equal(probabilities, BrightnessEngine().predict(IMAGES))
    for reply in (binary, text):
        assert reply.headers["x-rayloop-version"] == "7"
        assert reply.headers["x-rayloop-variant"] == "champion"
        assert len(reply.headers["x-rayloop-prediction-id"]) == 32


def test_predict_answers_an_image_with_everything_about_it() -> None:
    pixels = np.full((4, 3), 250, np.uint8)
    reply = request("POST", "/predict", png(pixels))
    answer = reply.json()
    assert answer["prediction_id"] == reply.headers["x-rayloop-prediction-id"]
    assert (answer["model"], answer["version"], answer["variant"]) == (
        "classifier",
        "7",
        "champion",
    )
    assert (answer["label"], answer["class_index"], answer["decision"]) == ("high", 1, "accept")
    assert answer["confidence"] == max(answer["probabilities"])
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + png(pixels) + b"\r\n--b--"
    )
    as_form = request("POST", "/predict", form, {"Content-Type": "multipart/form-data; boundary=b"})
    assert as_form.json()["probabilities"] == answer["probabilities"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"garbage", 415),
        (png(np.zeros((4, 3), np.uint8))[:40], 400),
        (png(np.zeros((5, 3), np.uint8)), 422),
    ],
)
def test_predict_refuses_with_the_right_status(body: bytes, status: int) -> None:
    reply = request("POST", "/predict", body)
    assert reply.status == status
    assert reply.json()["error"]


def test_a_large_body_is_refused_by_its_length_and_while_it_streams() -> None:
    path = "/v2/models/classifier/infer"
    declared = request("POST", path, [], {"Content-Length": "20001"})
    assert declared.status == 413
    streamed = request("POST", path, [b"x" * 9000] * 3)
    assert streamed.status == 413
    assert request("POST", path, b"", {"Content-Length": "many"}).status == 400


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies_are_understood(encoding: str, compress) -> None:
    body, head = infer_body(IMAGES)
    headers = {"Inference-Header-Content-Length": str(head), "Content-Encoding": encoding}
    path = "/v2/models/classifier/infer"
    assert request("POST", path, compress(body), headers).status == 200
    assert request("POST", path, compress(body)[:-5], headers).status == 400
    assert request("POST", path, b"not compressed", headers).status == 400
    assert request("POST", path, compress(bytes(10_000_000)), headers).status == 413
    assert request("POST", path, body, {**headers, "Content-Encoding": "br"}).status == 415


def test_deadlines_are_read_held_and_checked() -> None:
    for text in ("0", "-5", "soon", "nan", "1e99"):
        assert infer(headers={"x-request-timeout-ms": text}).status == 400
    assert infer(headers={"x-request-timeout-ms": "30000"}).status == 200
    engine = BrightnessEngine()
    engine.door.clear()

    async def main() -> Reply:
        service = make_service(engine, SPEC, CONFIG)
        body, head = infer_body(IMAGES)
        reply = await call(
            InferenceApp(service, CONFIG),
            "POST",
            "/v2/models/classifier/infer",
            body,
            {"Inference-Header-Content-Length": str(head), "x-request-timeout-ms": "10"},
        )
        engine.door.set()
        await service.close()
        return reply

    late = asyncio.run(main())
    assert late.status == 504
    assert "10 ms" in late.json()["error"]


def test_a_full_queue_is_429_with_retry_after_and_before_reading() -> None:
    engine = BrightnessEngine()
    engine.door.clear()
    config = ServeConfig(max_queued_rows=4, max_batch_rows=4, max_rows_per_request=4)

    async def main() -> tuple[Reply, list[Reply]]:
        service = make_service(engine, SPEC, config)
        app = InferenceApp(service, config)
        body, head = infer_body(np.zeros((4, 4, 3, 1), np.uint8))
        headers = {"Inference-Header-Content-Length": str(head)}
        path = "/v2/models/classifier/infer"
        first = asyncio.create_task(call(app, "POST", path, body, headers))
        assert await asyncio.to_thread(engine.entered.wait, 10)
        second = asyncio.create_task(call(app, "POST", path, body, headers))
        while service.queued_rows < 4:
            await asyncio.sleep(0)
        refused = await call(app, "POST", path, [], {"Content-Length": "100"})
        engine.door.set()
        answered = await asyncio.gather(first, second)
        await service.close()
        return refused, answered

    refused, answered = asyncio.run(main())
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert [reply.status for reply in answered] == [200, 200]


def test_a_model_that_fails_is_500_and_the_replica_lives_on() -> None:
    async def main() -> list[int]:
        service = make_service(BrightnessEngine(), SPEC, CONFIG)
        app = InferenceApp(service, CONFIG)
        statuses = []
        for first in (255, 0):
            images = IMAGES.copy()
            images[0, 0, 0, 0] = first
            body, head = infer_body(images)
            headers = {"Inference-Header-Content-Length": str(head)}
            path = "/v2/models/classifier/infer"
            statuses.append((await call(app, "POST", path, body, headers)).status)
        await service.close()
        return statuses

    assert asyncio.run(main()) == [500, 200]


def test_a_variant_can_be_forced_and_must_exist() -> None:
    assert infer(headers={"x-rayloop-variant": "champion"}).status == 200
    unknown = infer(headers={"x-rayloop-variant": "shadow"})
    assert unknown.status == 404
    assert "champion" in unknown.json()["error"]


@pytest.mark.parametrize("unit", ["日本語", "Ünïcödé", "plain"])
def test_a_unit_of_any_script_is_told_in_a_header(unit: str) -> None:
    events: list = []
    infer(headers={"x-rayloop-unit": unit}, events=events)
    assert events[0].unit == unit


def test_a_request_becomes_an_event() -> None:
    events: list = []
    reply = infer(headers={"x-rayloop-unit": "user-1"}, events=events)
    (event,) = events
    assert event.prediction_id == reply.headers["x-rayloop-prediction-id"]
    assert event.prediction_id.startswith(Remembers.writer)
    assert (event.unit, event.variant, event.forced, event.plan) == ("user-1", "champion", False, 1)
    assert (event.status, event.assigned_version, event.versions) == (200, SPEC.version, ())
    assert event.decisions == ("accept", "accept")
    assert event.images.tolist() == IMAGES.tolist()
    assert event.probabilities.shape == (2, len(SPEC.class_names))
    assert 0 <= event.queue_ms <= event.latency_ms
    assert 0 < event.engine_ms <= event.latency_ms


def test_a_client_that_leaves_gets_no_answer_and_breaks_nothing() -> None:
    async def main() -> list[dict]:
        service = make_service(BrightnessEngine(), SPEC, CONFIG)
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        app = InferenceApp(service, CONFIG)
        await app(scope, receive, send)
        assert (await call(app, "GET", "/v2/health/live")).status == 200
        await service.close()
        return sent

    assert asyncio.run(main()) == []


def test_lifespan_and_websockets_are_answered() -> None:
    async def main() -> list[str]:
        service = make_service(BrightnessEngine(), SPEC, CONFIG)
        app = InferenceApp(service, CONFIG)
        sent: list[str] = []
        phases = ["lifespan.startup", "lifespan.shutdown"]

        async def receive() -> dict:
            return {"type": phases.pop(0)}

        async def send(message: dict) -> None:
            sent.append(message["type"])

        await app({"type": "websocket", "path": "/"}, receive, send)
        await app({"type": "lifespan"}, receive, send)
        return sent

    assert asyncio.run(main()) == [
        "websocket.close",
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
