"""The protocol's extensions over REST, their parts, and the generated gRPC module."""

import asyncio
import gzip
import json
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.config import ServeConfig
from rayloop.errors import Corrupt
from rayloop.serve.assemble import make_service, make_variant
from rayloop.serve.batcher import Batcher
from rayloop.serve.client import infer_body
from rayloop.serve.encoding import compress, wanted_encoding
from rayloop.serve.http import InferenceApp
from rayloop.serve.protocol import generate
from rayloop.serve.protocol.answer import top_classes
from rayloop.serve.protocol.openapi import openapi_document
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.repository import Repository
from rayloop.serve.routes import FIXED, OF_A_MODEL, OF_THE_REPOSITORY
from rayloop.serve.statistics import BatchTimes, VersionStatistics, merged

SPEC = ModelSpec(model="classifier", version="7", shape=(2, 2, 1), class_names=("x", "y", "z"))
CONFIG = ServeConfig(max_body_bytes=20_000, max_rows_per_request=16, max_queued_rows=64)
IMAGES = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
INFER = "/v2/models/classifier/infer"


class Engine:
    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()
        self.seen: list[list[int]] = []

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.door.wait(20)
        self.seen.append(images[:, 0, 0, 0].tolist())
        first = images[:, 0, 0, 0].astype(np.float32) / 255
        return np.stack([first, first + 1 + self.shift, first], 1)

    def warm(self, batch_sizes) -> None:
        self.predict(IMAGES)


class Shelf:
    def published(self) -> list[str]:
        return ["7", "8", "10"]

    def load(self, version: str):
        if version == "10":
            raise Corrupt("its file was changed")
        spec = ModelSpec(
            model="classifier", version=version, shape=SPEC.shape, class_names=("a",) * 3
        )
        return make_variant(f"version-{version}", Engine(1.0), spec, CONFIG)

    def release(self, version: str) -> None:
        pass

    def shadow(self, version: str):
        raise NotImplementedError

    def newer_plan(self, number: int):
        return None

    def remember(self, changes) -> None:
        pass


class Session:
    """An app and what it answers, within one event loop."""

    def __init__(self, engine: Engine | None = None, shelf=None) -> None:
        self.engine = engine or Engine()
        self.service = make_service(self.engine, SPEC, CONFIG, shelf=shelf)
        self.app = InferenceApp(self.service, CONFIG)

    async def ask(self, method: str, path: str, body: bytes | dict = b"", headers=None):
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        incoming = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[dict] = []

        async def receive() -> dict:
            return incoming.pop(0) if incoming else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": ""}
        await self.app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], found, sent[1]["body"]


def run(talk, **more):
    async def main():
        session = Session(**more)
        try:
            return await talk(session)
        finally:
            await session.service.close()

    return asyncio.run(main())


def document(**more) -> dict:
    tensor = {"name": "image", "shape": [2, 2, 2, 1], "datatype": "UINT8", "data": IMAGES.tolist()}
    return {"inputs": [tensor], **more}


def test_labels_come_as_json_and_as_bytes() -> None:
    def wanted(binary: bool) -> dict:
        parameters = {"classification": 2, "binary_data": binary}
        return document(outputs=[{"name": "probabilities", "parameters": parameters}])

    async def talk(session: Session):
        return [await session.ask("POST", INFER, wanted(binary)) for binary in (False, True)]

    text, binary = run(talk)
    output = json.loads(text[2])["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == [
        "1.000000:1:y", "0.000000:0:x", "1.015686:1:y", "0.015686:0:x",
    ]  # fmt: skip
    split = int(binary[1]["inference-header-content-length"])
    said, tail = json.loads(binary[2][:split])["outputs"][0], binary[2][split:]
    assert said["parameters"]["binary_data_size"] == len(tail)
    found = []
    while tail:
        (size,) = struct.unpack_from("<I", tail)
        found.append(tail[4 : 4 + size].decode())
        tail = tail[4 + size :]
    assert found == output["data"]


def test_more_classes_than_there_are_give_all_and_ties_keep_their_order() -> None:
    async def talk(session: Session):
        parameters = {"classification": 99}
        body = document(outputs=[{"name": "probabilities", "parameters": parameters}])
        return await session.ask("POST", INFER, body)

    output = json.loads(run(talk)[2])["outputs"][0]
    assert output["shape"] == [2, 3]
    assert [text.split(":")[1] for text in output["data"][:3]] == ["1", "0", "2"]
    assert top_classes(np.float32([[0.5, 0.5]]), ("a", "b"), 1) == [["0.500000:0:a"]]


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({}, 200),
        ({"anything": "goes", "number": 1.5, "yes": True}, 200),
        ({"priority": 0}, 200),
        ({"priority": 3, "timeout": 20_000_000}, 200),
        ({"sequence_id": 0, "sequence_start": False}, 200),
        ({"triton_enable_empty_final_response": True}, 200),
        ({"priority": 4}, 400),
        ({"priority": -1}, 400),
        ({"priority": "1"}, 400),
        ({"priority": True}, 400),
        ({"timeout": -1}, 400),
        ({"timeout": 1.5}, 400),
        ({"timeout": 10**12}, 400),
        ({"timeout": 1}, 504),
        ({"sequence_id": 1}, 400),
        ({"sequence_id": "a"}, 400),
        ({"sequence_end": True}, 400),
        ({"nested": {}}, 400),
        ({"nested": None}, 400),
        ({"rayloop_unit": 5}, 400),
        ({"rayloop_variant": "nobody"}, 404),
        ({"shared_memory_region": "r"}, 400),
    ],
)
def test_request_parameters(parameters: dict, status: int) -> None:
    async def talk(session: Session):
        return await session.ask("POST", INFER, document(parameters=parameters))

    found, _, body = run(talk)
    assert found == status
    assert ("error" in json.loads(body)) == (status != 200)


def test_the_urgent_go_first_and_a_batch_never_mixes_up_answers() -> None:
    engine = Engine()

    async def main() -> None:
        batcher = Batcher(engine.predict, max_batch_rows=2, max_wait_s=0.0, max_queued_rows=100)

        def rows(first: int, count: int = 1) -> np.ndarray:
            return np.full((count, 2, 2, 1), first, np.uint8)

        engine.door.clear()
        tasks = [asyncio.create_task(batcher.submit(rows(0), 30))]
        assert await asyncio.to_thread(engine.entered.wait, 10)
        for first, priority, count in ((1, 3, 1), (2, 2, 2), (3, 1, 1), (4, 3, 1), (5, 1, 2)):
            task = batcher.submit(rows(first, count), 30, priority)
            tasks.append(asyncio.create_task(task))
            await asyncio.sleep(0)
        engine.door.set()
        answers = await asyncio.gather(*tasks)
        for first, answer in enumerate(answers):
            assert answer[0, 0] == np.float32(first) / 255
        assert batcher.queued_rows == 0
        await batcher.close()

    asyncio.run(main())
    assert engine.seen == [[0], [3], [5, 5], [2, 2], [1, 4]]


def test_versions_over_rest() -> None:
    async def talk(session: Session):
        async def status(method: str, path: str, body: bytes | dict = b"") -> int:
            found, _, content = await session.ask(method, path, body)
            assert found == 200 or list(json.loads(content)) == ["error"]
            return found

        load = "/v2/repository/models/classifier/load"
        unload = "/v2/repository/models/classifier/unload"
        eight = {"parameters": {"version": "8"}}
        assert await status("GET", "/v2/models/classifier/versions/8") == 404
        assert await status("POST", load, eight) == 200
        assert await status("POST", load, eight) == 200
        assert await status("GET", "/v2/models/classifier/versions/8/ready") == 200
        body = document()
        _, headers, content = await session.ask(
            "POST", INFER.replace("infer", "versions/8/infer"), body
        )
        assert (json.loads(content)["model_version"], headers["x-rayloop-version"]) == ("8", "8")
        assert json.loads((await session.ask("POST", INFER, body))[2])["model_version"] == "7"
        _, _, index = await session.ask("POST", "/v2/repository/index", {"ready": True})
        assert [entry["version"] for entry in json.loads(index)] == ["7", "8"]
        assert await status("POST", unload, {"parameters": {"unload_dependents": True}}) == 200
        for path in ("/v2/health/ready", "/v2/models/classifier/ready", "/v2/models/classifier"):
            found, headers, _ = await session.ask("GET", path)
            assert (found, headers["retry-after"]) == (503, "1")
        assert await status("GET", "/v2/health/live") == 200
        assert await status("POST", INFER, body) == 503
        assert await status("POST", "/predict", b"x") == 503
        assert await status("POST", load) == 200
        assert await status("GET", "/v2/health/ready") == 200
        assert await status("POST", INFER, body) == 200
        assert await status("POST", load, {"parameters": {"version": "10"}}) == 404
        assert await status("POST", load, {"parameters": {"version": "x"}}) == 400
        assert await status("POST", load, {"parameters": []}) == 400
        assert await status("POST", load, b"[]") == 400
        assert await status("POST", load, {"parameters": {"config": "{"}}) == 400
        assert await status("POST", load, {"parameters": {"file:1/m": "aGk="}}) == 400
        assert await status("POST", unload, {"parameters": {"version": "99"}}) == 404
        assert await status("POST", load.replace("classifier", "other")) == 404
        assert await status("GET", load) == 405
        assert await status("GET", "/v2/systemsharedmemory/status") == 501

    run(talk, shelf=Shelf())


def test_what_waits_is_answered_before_a_version_goes() -> None:
    engine = Engine()

    async def talk(session: Session):
        engine.door.clear()
        body, head = infer_body(IMAGES)
        sent = {"Inference-Header-Content-Length": str(head)}
        first = asyncio.create_task(session.ask("POST", INFER, body, sent))
        assert await asyncio.to_thread(engine.entered.wait, 10)
        second = asyncio.create_task(session.ask("POST", INFER, body, sent))
        while not session.service.queued_rows:
            await asyncio.sleep(0)
        leaving = asyncio.create_task(
            session.ask("POST", "/v2/repository/models/classifier/unload")
        )
        while session.service.versions:
            await asyncio.sleep(0)
        late = await session.ask("POST", INFER, body, sent)
        engine.door.set()
        return [(await task)[0] for task in (first, second, leaving)], late[0]

    assert run(talk, engine=engine) == ([200, 200, 200], 503)


def test_a_load_reaches_the_other_replicas() -> None:
    told: list[tuple[str, str]] = []

    async def tell(verb: str, version: str) -> None:
        told.append((verb, version))

    async def main() -> None:
        service = make_service(Engine(), SPEC, CONFIG, shelf=Shelf())
        repository = Repository(service, tell_others=tell)
        await repository.load("classifier", {"version": 8})
        await repository.apply("load", "8")
        await repository.unload("classifier", {"version": "8"})
        await service.close()

    asyncio.run(main())
    assert told == [("load", "8"), ("unload", "8")]


def test_statistics_over_rest_and_their_sums() -> None:
    async def talk(session: Session):
        for _ in range(3):
            await session.ask("POST", INFER, document())
        await session.ask("POST", INFER, document(parameters={"timeout": 1}))
        paths = ("/v2/models/stats", "/v2/models/classifier/stats",
                 "/v2/models/classifier/versions/7/stats")  # fmt: skip
        found = [json.loads((await session.ask("GET", path))[2]) for path in paths]
        unknown = await session.ask("GET", "/v2/models/classifier/versions/9/stats")
        return found, unknown[0]

    found, unknown = run(talk)
    assert unknown == 404
    assert found[0] == found[1] == found[2]
    (entry,) = found[0]["model_stats"]
    assert (entry["name"], entry["version"]) == ("classifier", "7")
    assert (entry["inference_count"], entry["execution_count"]) == (6, 3)
    inside = entry["inference_stats"]
    assert (inside["success"]["count"], inside["fail"]["count"]) == (3, 1)
    assert inside["queue"]["count"] == 3
    assert [
        (size["batch_size"], size["compute_infer"]["count"]) for size in entry["batch_stats"]
    ] == [(2, 3)]
    parts = sum(inside[name]["ns"] for name in ("queue", "compute_input", "compute_infer"))
    assert 0 < parts <= inside["success"]["ns"]
    assert entry["last_inference"] > 1_700_000_000_000


calls = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9)), max_size=8)


@given(calls, calls)
def test_replicas_add_up_as_if_they_were_one(one, other) -> None:
    def statistics(entries) -> VersionStatistics:
        found = VersionStatistics()
        for rows, requests, ns in entries:
            found.executed(rows, requests, BatchTimes(ns, 2 * ns, 3 * ns))
            found.finished(ns > 2, ns, 5.0 if ns > 2 else 0.0)
        return found

    two = [[statistics(part).to_json("m", "1")] for part in (one, other)]
    together = statistics([*one, *other]).to_json("m", "1")
    assert merged(two) == [together]
    assert merged([two[0], []]) == two[0]


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("gzip", "gzip"),
        ("gzip, deflate, br", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0, deflate;q=0.5", "deflate"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("*", "gzip"),
        ("*;q=0", ""),
        ("br", ""),
        ("identity", ""),
        ("gzip;q=0.5, identity;q=0.9", ""),
        ("gzip;q=many", ""),
        ("", ""),
        (",,;;=", ""),
    ],
)
def test_the_encoding_a_client_asked_for(accept: str, encoding: str) -> None:
    assert wanted_encoding(accept) == encoding


@given(st.text(max_size=60))
def test_no_accept_encoding_breaks_the_server(accept: str) -> None:
    assert wanted_encoding(accept) in ("", "gzip", "deflate")


def test_large_answers_are_compressed_when_asked_and_small_ones_are_not() -> None:
    async def talk(session: Session):
        plain = await session.ask("GET", "/openapi.json")
        packed = await session.ask("GET", "/openapi.json", headers={"Accept-Encoding": "gzip"})
        deflated = await session.ask("GET", "/openapi.json", headers={"Accept-Encoding": "deflate"})
        small = await session.ask("GET", "/v2", headers={"Accept-Encoding": "gzip"})
        return plain, packed, deflated, small

    plain, packed, deflated, small = run(talk)
    assert "content-encoding" not in plain[1]
    assert packed[1]["content-encoding"] == "gzip"
    assert int(packed[1]["content-length"]) == len(packed[2])
    assert gzip.decompress(packed[2]) == zlib.decompress(deflated[2]) == plain[2]
    assert "content-encoding" not in small[1]


def test_what_is_inflated_counts_and_bombs_are_refused() -> None:
    async def talk(session: Session):
        bomb = gzip.compress(bytes(50_000_000))
        statuses = []
        for body in (bomb, bomb[:1000], compress(b"{}", "gzip") + b"more"):
            found = await session.ask("POST", INFER, body, {"Content-Encoding": "gzip"})
            statuses.append(found[0])
        assert session.app._gate.inflight_bytes == 0
        return statuses

    assert run(talk) == [413, 413, 400]


def test_json_that_would_fill_the_memory_is_refused_before_it_is_parsed() -> None:
    async def talk(session: Session):
        many = b'{"inputs":[' + b"1," * 9_000 + b"1]}"
        config = ServeConfig(max_body_bytes=10_000_000, max_rows_per_request=1, max_queued_rows=64)
        app = InferenceApp(session.service, config)
        session.app = app
        statuses = []
        for body in (many, b'{"inputs":[' + b"1," * 2_000_000 + b"1]}", b"[" * 1_000_000):
            statuses.append((await session.ask("POST", INFER, body))[0])
        return statuses

    assert run(talk) == [400, 413, 400]


def test_openapi_names_every_route_and_resolves() -> None:
    found = openapi_document(SPEC)
    prefixes = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    expected = set(FIXED) | {
        f"/v2/repository/models/{{model}}/{verb}" for verb in OF_THE_REPOSITORY
    }
    expected |= {f"{prefix}/{name}".rstrip("/") for prefix in prefixes for name in OF_A_MODEL}
    assert set(found["paths"]) == expected
    schemas = found["components"]["schemas"]

    def references(value: object):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    used = {reference.rsplit("/", 1)[1] for reference in references(found)}
    assert used <= set(schemas)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}


def test_the_generated_module_is_up_to_date() -> None:
    made = (generate.FOLDER / generate.MADE).read_text()
    assert generate.generated() == made, "run: python -m rayloop.serve.protocol.generate"


def test_the_definition_is_the_protocols_own_and_lives_beside_a_clients_copy() -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    from rayloop.serve.protocol import inference_pb2 as pb

    theirs = {**model_config_pb2.DESCRIPTOR.message_types_by_name}
    theirs |= service_pb2.DESCRIPTOR.message_types_by_name

    def compare(own, other) -> None:
        known = {field.number: field for field in other.fields}
        for field in own.fields:
            match = known[field.number]
            assert (field.name, field.type, field.is_repeated) == (
                match.name,
                match.type,
                match.is_repeated,
            )
        inner = {nested.name: nested for nested in other.nested_types}
        for nested in own.nested_types:
            compare(nested, inner[nested.name])

    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        compare(message, theirs[name])
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    own = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert set(own) == set(methods)
    assert pb.ModelInferRequest is not service_pb2.ModelInferRequest
