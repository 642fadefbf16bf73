"""The gRPC face on a real port of this process: every method, every status, no Ray."""

import asyncio
import io
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rayloop.config import ServeConfig
from rayloop.ports import free_port
from rayloop.serve.assemble import make_service, make_variant
from rayloop.serve.catalog import Catalog
from rayloop.serve.grpc_app import NOT_OFFERED, SERVICE, GrpcApp
from rayloop.serve.grpc_server import own_server
from rayloop.serve.protocol import inference_pb2 as pb
from rayloop.serve.protocol.spec import ModelSpec

SPEC = ModelSpec(model="classifier", version="7", shape=(4, 3, 1), class_names=("low", "high"))
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 4, 3, 1)
CONFIG = ServeConfig(
    max_body_bytes=20_000, max_rows_per_request=8, max_queued_rows=8, max_batch_rows=4
)


class Engine:
    """The brighter, the likelier `high`; breaks on an image that starts with 255."""

    def __init__(self) -> None:
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()
        self.rows = 0

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.door.wait(20)
        self.rows += len(images)
        if (images[:, 0, 0, 0] == 255).any():
            raise ValueError("too bright")
        high = images.reshape(len(images), -1).mean(1, dtype=np.float64) / 255
        return np.stack([1 - high, high], 1).astype(np.float32)

    def warm(self, batch_sizes) -> None:
        self.predict(IMAGES)


class Shelf:
    """Versions 7, 8 and 9, of which 9 is damaged."""

    def __init__(self) -> None:
        self.noted: list = []

    def published(self) -> list[str]:
        return ["7", "8", "9"]

    def load(self, version: str):
        from rayloop.errors import Corrupt

        if version == "9":
            raise Corrupt("version 9 is damaged")
        spec = ModelSpec(
            model="classifier", version=version, shape=SPEC.shape, class_names=("a", "b")
        )
        return make_variant(f"version-{version}", Engine(), spec, CONFIG)

    def release(self, version: str) -> None:
        pass

    def shadow(self, version: str):
        raise NotImplementedError

    def newer_plan(self, number: int):
        return None

    def remember(self, changes) -> None:
        self.noted.append((changes.loaded, changes.unloaded))


class Client:
    """Calls by name, with messages or with raw bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def call(self, name: str, message=None, **options):
        asked = message if isinstance(message, bytes) else (
            message or getattr(pb, f"{name}Request")()
        ).SerializeToString()  # fmt: skip
        read = getattr(pb, f"{name}Response").FromString
        return self._channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=read)(
            asked, **options
        )

    def stream(self, messages):
        return self._channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(messages)


def serve(talk: Callable[[Client], Awaitable], engine=None, config=CONFIG, shelf=None):
    async def main():
        service = make_service(engine or Engine(), SPEC, config, shelf=shelf)
        for_port = ServeConfig(
            **{name: getattr(config, name) for name in config.__slots__}
            | {"grpc_port": free_port("127.0.0.1")}
        )
        server = own_server(GrpcApp(Catalog(service, config), config), for_port)
        await server.start()
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{for_port.grpc_port}", options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            result = await talk(Client(channel))
        await server.stop(None)
        await service.close()
        return result

    return asyncio.run(main())


def infer(images: np.ndarray = IMAGES, typed: bool = False, **more) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(
        model_name="classifier",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": list(images.shape)}],
    )
    if typed:
        message.inputs[0].contents.uint_contents.extend(images.ravel().tolist())
    else:
        message.raw_input_contents.append(images.tobytes())
    for name, value in more.items():
        setattr(message, name, value)
    return message


def floats(answer) -> np.ndarray:
    assert answer.outputs[0].datatype == "FP32"
    raw = np.frombuffer(answer.raw_output_contents[0], "<f4")
    return raw.reshape(list(answer.outputs[0].shape))


def status(message, name: str = "ModelInfer", **options) -> grpc.StatusCode:
    async def talk(client: Client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call(name, message, **options)
        assert caught.value.details()
        assert (await client.call("ServerLive")).live
        return caught.value.code()

    return serve(talk)


def test_raw_and_typed_contents_give_the_engines_bits() -> None:
    async def talk(client: Client):
        return [await client.call("ModelInfer", infer(typed=t, id="a")) for t in (False, True)]

    for answer in serve(talk):
        np.testing.assert_array_equal(floats(answer), Engine().predict(IMAGES))
        assert (answer.id, answer.model_name, answer.model_version) == ("a", "classifier", "7")
        assert answer.parameters["rayloop_variant"].string_param == "champion"
        assert len(answer.parameters["rayloop_prediction_id"].string_param) == 32


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def test_image_files_come_as_bytes_raw_or_typed() -> None:
    files = [png(image) for image in IMAGES]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2]}
    typed = pb.ModelInferRequest(model_name="classifier", inputs=[tensor])
    typed.inputs[0].contents.bytes_contents.extend(files)
    raw = pb.ModelInferRequest(model_name="classifier", inputs=[{**tensor, "shape": [2, 1]}])
    raw.raw_input_contents.append(b"".join(struct.pack("<I", len(f)) + f for f in files))

    async def talk(client: Client):
        return [await client.call("ModelInfer", message) for message in (typed, raw)]

    for answer in serve(talk):
        np.testing.assert_array_equal(floats(answer), Engine().predict(IMAGES))
    typed.inputs[0].contents.bytes_contents[1] = b"garbage"
    assert status(typed) is grpc.StatusCode.INVALID_ARGUMENT
    raw.raw_input_contents[0] = raw.raw_input_contents[0][:-1]
    assert status(raw) is grpc.StatusCode.INVALID_ARGUMENT


def test_classification_gives_labels() -> None:
    message = infer()
    output = message.outputs.add(name="probabilities")
    output.parameters["classification"].int64_param = 1

    async def talk(client: Client):
        return await client.call("ModelInfer", message)

    answer = serve(talk)
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [2, 1])
    raw = answer.raw_output_contents[0]
    (size,) = struct.unpack_from("<I", raw)
    score, index, label = raw[4 : 4 + size].decode().split(":")
    assert (index, label) == ("0", "low")
    assert float(score) == pytest.approx(1 - IMAGES[0].mean() / 255, abs=1e-5)


def broken(**changes) -> pb.ModelInferRequest:
    message = infer()
    tensor = message.inputs[0]
    for name, value in changes.items():
        if name == "shape":
            tensor.ClearField("shape")
            tensor.shape.extend(value)
        elif name == "parameter":
            message.parameters[value[0]].MergeFrom(value[1])
        elif name == "raw":
            message.ClearField("raw_input_contents")
            message.raw_input_contents.extend(value)
        elif name == "output":
            message.outputs.add(name=value)
        else:
            setattr(tensor if hasattr(tensor, name) else message, name, value)
    return message


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\xff garbage", INVALID),
        (pb.ModelInferRequest(), MISSING),
        (pb.ModelInferRequest(model_name="classifier"), INVALID),
        (infer(model_name="other"), MISSING),
        (infer(model_version="8"), MISSING),
        (broken(name="picture"), INVALID),
        (broken(datatype="FP32"), INVALID),
        (broken(datatype="UINT9"), INVALID),
        (broken(shape=[]), INVALID),
        (broken(shape=[2, 4, 3]), INVALID),
        (broken(shape=[2, -4, 3, 1]), INVALID),
        (broken(shape=[2**40, 4, 3, 1]), INVALID),
        (broken(shape=[9, 4, 3, 1]), INVALID),
        (broken(raw=[]), INVALID),
        (broken(raw=[b"123"]), INVALID),
        (broken(raw=[b"1", b"2"]), INVALID),
        (broken(output="logits"), INVALID),
        (broken(parameter=("priority", pb.InferParameter(int64_param=4))), INVALID),
        (broken(parameter=("priority", pb.InferParameter(string_param="1"))), INVALID),
        (broken(parameter=("timeout", pb.InferParameter(int64_param=-1))), INVALID),
        (broken(parameter=("sequence_id", pb.InferParameter(int64_param=5))), INVALID),
        (broken(parameter=("sequence_start", pb.InferParameter(bool_param=True))), INVALID),
        (broken(parameter=("x", pb.InferParameter())), INVALID),
        (broken(parameter=("rayloop_variant", pb.InferParameter(string_param="x"))), MISSING),
        (broken(parameter=("timeout", pb.InferParameter(int64_param=1))),
         grpc.StatusCode.DEADLINE_EXCEEDED),
        (infer(np.full((1, 4, 3, 1), 255, np.uint8)), grpc.StatusCode.INTERNAL),
    ],
)  # fmt: skip
def test_each_error_has_its_status(message, code) -> None:
    assert status(message) is code


def test_metadata_is_read_and_checked() -> None:
    unknown = (("x-rayloop-variant", "shadow"),)
    assert status(infer(), metadata=unknown) is MISSING
    assert status(infer(), metadata=(("x-request-timeout-ms", "soon"),)) is INVALID


def test_typed_pixels_above_255_and_both_kinds_of_contents_are_refused() -> None:
    bright = infer(typed=True)
    bright.inputs[0].contents.uint_contents[0] = 256
    assert status(bright) is INVALID
    both = infer(typed=True)
    both.raw_input_contents.append(IMAGES.tobytes())
    assert status(both) is INVALID
    wrong = infer()
    wrong.ClearField("raw_input_contents")
    wrong.inputs[0].contents.fp32_contents.extend([0.0] * 24)
    assert status(wrong) is INVALID


def test_a_message_beyond_the_limit_is_refused_before_it_is_decoded() -> None:
    assert status(bytes(CONFIG.max_body_bytes + 1)) is INVALID
    assert status(bytes(10 * CONFIG.max_body_bytes)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_understood_and_a_bomb_is_refused() -> None:
    async def talk(client: Client):
        packed = {"compression": grpc.Compression.Gzip}
        good = await client.call("ModelInfer", infer(), **packed)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("ModelInfer", bytes(50_000_000), **packed)
        assert (await client.call("ServerLive")).live
        return floats(good), caught.value.code()

    found, code = serve(talk)
    np.testing.assert_array_equal(found, Engine().predict(IMAGES))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_queue_is_resource_exhausted_and_a_cancelled_call_never_reaches_the_engine() -> None:
    engine = Engine()
    engine.door.clear()
    eight = infer(np.zeros((8, 4, 3, 1), np.uint8))

    async def talk(client: Client) -> tuple:
        first = client.call("ModelInfer", infer(np.zeros((4, 4, 3, 1), np.uint8)))
        assert await asyncio.to_thread(engine.entered.wait, 10)
        waiting = client.call("ModelInfer", eight)
        refused = None
        while refused is None:  # until the waiting one has arrived and fills the queue
            try:
                await client.call("ModelInfer", b"not even decoded", timeout=20)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refused = error
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        while True:  # until the cancelled one has left the queue
            with suppress(grpc.aio.AioRpcError):
                answer = asyncio.ensure_future(_result(client.call("ModelInfer", infer())))
                done, _ = await asyncio.wait({answer}, timeout=0.2)
                if not done:
                    break
        engine.door.set()
        return refused, floats(await first), floats(await answer)

    refused, first, last = serve(talk, engine)
    assert dict(refused.trailing_metadata())["retry-after"] == "1"
    assert (len(first), len(last)) == (4, 2)
    assert engine.rows == 6


async def _result(call):
    return await call


def test_the_clients_deadline_is_the_requests_deadline() -> None:
    engine = Engine()
    engine.door.clear()

    async def talk(client: Client):
        first = client.call("ModelInfer", infer())
        assert await asyncio.to_thread(engine.entered.wait, 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("ModelInfer", infer(), timeout=0.05)
        engine.door.set()
        await first
        return caught.value.code()

    assert serve(talk, engine) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engine.rows == 2


def test_a_stream_answers_in_order_and_errors_are_single() -> None:
    messages = [infer(id=str(index)) for index in range(60)]
    messages[3] = infer(id="3", model_name="other")
    messages[5].parameters["triton_enable_empty_final_response"].bool_param = True

    async def talk(client: Client):
        return [answer async for answer in client.stream(iter(messages))]

    answers = serve(talk, config=ServeConfig())
    assert len(answers) == 60
    assert "other" in answers[3].error_message
    for index, answer in enumerate(answers):
        if index != 3:
            assert answer.infer_response.id == str(index)
            assert answer.error_message == ""
    assert answers[5].infer_response.parameters["triton_final_response"].bool_param


def test_documents_say_what_is_served() -> None:
    async def talk(client: Client):
        named = {"name": "classifier"}
        await client.call("ModelInfer", infer())
        return [
            await client.call("ServerMetadata"),
            await client.call("ModelMetadata", pb.ModelMetadataRequest(**named, version="7")),
            await client.call("ModelConfig", pb.ModelConfigRequest(**named)),
            await client.call("ModelStatistics", pb.ModelStatisticsRequest(**named)),
            await client.call("ServerReady"),
            await client.call("ModelReady", pb.ModelReadyRequest(**named)),
            await client.call("ModelReady", pb.ModelReadyRequest(name="other")),
        ]

    server, model, config, statistics, ready, own, other = serve(talk)
    assert server.name == "rayloop"
    assert {"statistics", "model_repository", "classification"} <= set(server.extensions)
    assert (list(model.versions), list(model.inputs[0].shape)) == (["7"], [-1, 4, 3, 1])
    assert config.config.max_batch_size == 8
    assert config.config.dynamic_batching.priority_levels == 3
    entry = statistics.model_stats[0]
    assert (entry.inference_count, entry.execution_count) == (2, 1)
    assert entry.inference_stats.success.count == 1
    assert entry.inference_stats.success.ns >= entry.inference_stats.compute_infer.ns > 0
    assert (ready.ready, own.ready, other.ready) == (True, True, False)


def test_versions_are_listed_loaded_and_unloaded() -> None:
    shelf = Shelf()
    load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
    eight = {"version": pb.ModelRepositoryParameter(string_param="8")}

    async def talk(client: Client):
        states = []

        async def note() -> None:
            index = await client.call("RepositoryIndex")
            states.append({entry.version: entry.state for entry in index.models})

        await note()
        await client.call("RepositoryModelLoad", load(model_name="classifier", parameters=eight))
        await note()
        answer = await client.call("ModelInfer", infer(model_version="8"))
        assert answer.model_version == "8"
        assert (await client.call("ModelInfer", infer())).model_version == "7"
        await client.call("RepositoryModelUnload", unload(model_name="classifier"))
        await note()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("ModelInfer", infer())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not (await client.call("ServerReady")).ready
        await client.call("RepositoryModelLoad", load(model_name="classifier"))
        await note()
        assert (await client.call("ModelInfer", infer())).model_version == "7"
        for wrong, code in (
            (load(model_name="other"), MISSING),
            (load(model_name="classifier", parameters={"config": pb.ModelRepositoryParameter(
                string_param='{"version_policy": {"specific": {"versions": [9]}}}')}), MISSING),
            (load(model_name="classifier", parameters={"config": pb.ModelRepositoryParameter(
                string_param="[]")}), INVALID),
            (load(model_name="classifier", parameters={"file:1/model.onnx":
                pb.ModelRepositoryParameter(bytes_param=b"x")}), INVALID),
        ):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.call("RepositoryModelLoad", wrong)
            assert caught.value.code() is code
        return states

    on, off = "READY", "UNAVAILABLE"
    assert serve(talk, shelf=shelf) == [
        {"7": on, "8": off, "9": off},
        {"7": on, "8": on, "9": off},
        {"7": off, "8": off, "9": off},
        {"7": on, "8": on, "9": off},
    ]
    assert shelf.noted[0] == (("8",), ())
    assert ((), ("7", "8")) in shelf.noted
    assert shelf.noted[-1] == (("8",), ())


def test_model_control_can_be_turned_off() -> None:
    config = ServeConfig(model_control=False)

    async def talk(client: Client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call(
                "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="classifier")
            )
        return caught.value.code()

    assert serve(talk, config=config) is grpc.StatusCode.PERMISSION_DENIED


def test_what_is_not_offered_says_so() -> None:
    async def talk(client: Client):
        codes = set()
        for name in NOT_OFFERED:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.call(name)
            codes.add(caught.value.code())
        return codes

    assert serve(talk) == {grpc.StatusCode.UNIMPLEMENTED}


def test_every_method_of_the_definition_has_a_handler() -> None:
    async def main():
        service = make_service(Engine(), SPEC, CONFIG)
        handlers = GrpcApp(Catalog(service, CONFIG), CONFIG).handlers()
        found = {path.rsplit("/", 1)[1] for path in handlers._method_handlers}
        await service.close()
        return found

    defined = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert asyncio.run(main()) == set(defined)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            lambda cut, flip: _damaged(cut, flip), st.integers(0, 200), st.integers(0, 200)
        ),
        max_size=12,
    )
)
def test_no_bytes_break_the_server(messages: list[bytes]) -> None:
    async def talk(client: Client) -> None:
        for data in messages:
            try:
                answer = await client.call("ModelInfer", data)
            except grpc.aio.AioRpcError as error:
                assert error.code() in (INVALID, MISSING)
            else:
                assert answer.outputs
        assert (await client.call("ServerLive")).live

    serve(talk)


def _damaged(cut: int, flip: int) -> bytes:
    data = bytearray(infer().SerializeToString())
    data[flip % len(data)] ^= 0x41
    return bytes(data[: cut or None])
