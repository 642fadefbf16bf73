"""Turn calls of `inference.GRPCInferenceService` into predictions and documents.

Handlers take and give bytes, so that a call is refused before it is decoded.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from rayloop.config import ServeConfig
from rayloop.serve import ongoing
from rayloop.serve.admission import Limits
from rayloop.serve.body import BodyGate
from rayloop.serve.call import near_or_far, wanted_timeout_ms
from rayloop.serve.catalog import Catalog
from rayloop.serve.protocol import inference_pb2 as pb
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.messages import infer_response, parse_message, scalars
from rayloop.serve.protocol.request import InferRequest
from rayloop.serve.reply import as_protocol_error, who_answered_parameters

SERVICE = "inference.GRPCInferenceService"

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status by HTTP status; INTERNAL for the rest."""

STREAM_AHEAD = 32
"""Requests of one stream that may be under way at the same time."""

NOT_OFFERED = (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)

LOCAL_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "ipv6:[::ffff:127.", "unix:",
               "ipv6:%5B::ffff:127.")  # fmt: skip

Answerer = Callable[[Any], Awaitable[dict[str, Any]]]


class GrpcApp:
    """The gRPC face of one replica.

    Args:
        catalog: The model, and the service that answers.
        config: Limits and times.
        local_only: Refuse callers from other machines; for a port that is bound more widely than
            `serve.host`.
    """

    def __init__(self, catalog: Catalog, config: ServeConfig, local_only: bool = False) -> None:
        self._catalog = catalog
        self._service = catalog.service
        self._config = config
        self._local_only = local_only
        self._gate = BodyGate(
            Limits.of(config), lambda: self._service.queued_rows, lambda: self._service.wait_s
        )

    def limit(self, config: ServeConfig) -> None:
        """Let in what other limits allow; bodies that are being read keep theirs."""
        self._config = config
        self._gate.limits = Limits.of(config)

    def handlers(self) -> Any:
        """The service as a generic handler for a `grpc.aio` server."""
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self._telling(name, answer))
            for name, answer in self._questions().items()
        }
        for name in NOT_OFFERED:
            methods[name] = grpc.unary_unary_rpc_method_handler(_not_offered)
        methods["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.model_infer)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.model_stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def model_infer(self, data: bytes, context: Any) -> bytes:
        """Answer one `ModelInferRequest`."""
        try:
            with ongoing.GRPC.one():
                message = await self._infer(data, context)
        except Exception as error:  # every error gets its status
            return refuse(context, error)
        answer: bytes = message.SerializeToString()
        return answer

    async def model_stream_infer(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Answer the requests of a stream, in their order; an error is one message's own."""
        waiting: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_AHEAD)

        async def read() -> None:
            try:
                async for data in requests:
                    await waiting.put(asyncio.create_task(self._stream_one(data, context)))
            finally:
                await waiting.put(None)

        reader = asyncio.create_task(read())
        task: asyncio.Task[bytes] | None = None
        try:
            while (task := await waiting.get()) is not None:
                yield await task
        finally:
            reader.cancel()
            while task is not None:
                task.cancel()
                task = None if waiting.empty() else waiting.get_nowait()

    async def _stream_one(self, data: bytes, context: Any) -> bytes:
        answer = pb.ModelStreamInferResponse()
        try:
            with ongoing.GRPC.one():
                message = await self._infer(data, context, final_flag=True)
            answer.infer_response.CopyFrom(message)
        except Exception as error:  # it becomes the answer to this message alone
            answer.error_message = as_protocol_error(error).message
        content: bytes = answer.SerializeToString()
        return content

    async def _infer(self, data: bytes, context: Any, final_flag: bool = False) -> Any:
        self._check_peer(context)
        arrived_at = asyncio.get_running_loop().time()
        unit, variant, timeout_s = self._asked(context)
        self._gate.check(str(len(data)), timeout_s)
        with self._gate.holding() as held:
            held.count(len(data))
            message, request = await near_or_far(len(data), lambda: self._parse(data))
            schedule = request.schedule
            if schedule.timeout_s is not None:
                timeout_s = min(timeout_s, schedule.timeout_s)
            spent_s = asyncio.get_running_loop().time() - arrived_at
            prediction = await self._service.predict(
                request.images,
                unit=unit or schedule.unit,
                forced=variant or schedule.variant,
                timeout_s=timeout_s - spent_s,
                version=message.model_version,
                priority=schedule.priority,
            )
        response = infer_response(
            prediction.probabilities,
            prediction.spec,
            request.request_id,
            request.output,
            who_answered_parameters(prediction),
        )
        if final_flag and schedule.final_flag:
            response.parameters["triton_final_response"].bool_param = True
        return response

    def _parse(self, data: bytes) -> tuple[Any, InferRequest]:
        message = decode(pb.ModelInferRequest, data)
        spec = self._catalog.find(message.model_name, message.model_version).spec
        return message, parse_message(message, spec, self._config.max_rows_per_request)

    def _asked(self, context: Any) -> tuple[str, str, float]:
        """Unit, variant and seconds left, from the call's metadata and deadline."""
        unit = variant = ""
        timeout_text: str | None = None
        for name, value in context.invocation_metadata() or ():
            if name == "x-rayloop-unit":
                unit = str(value)
            elif name == "x-rayloop-variant":
                variant = str(value)
            elif name == "x-request-timeout-ms":
                timeout_text = str(value)
        timeout_s = wanted_timeout_ms(timeout_text, self._config.default_timeout_ms) / 1000
        left_s = context.time_remaining()
        return unit, variant, timeout_s if left_s is None else min(timeout_s, left_s)

    def _check_peer(self, context: Any) -> None:
        if self._local_only and not context.peer().startswith(LOCAL_PEERS):
            raise ProtocolError(403, "This server answers its own machine only; see serve.host.")

    def _telling(self, name: str, answer: Answerer) -> Callable[[bytes, Any], Awaitable[bytes]]:
        asked, told = getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response")

        async def tell(data: bytes, context: Any) -> bytes:
            try:
                self._check_peer(context)
                document = await answer(decode(asked, data))
                content: bytes = ParseDict(document, told()).SerializeToString()
            except Exception as error:  # every error gets its status
                return refuse(context, error)
            return content

        return tell

    def _questions(self) -> dict[str, Answerer]:
        return {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._model,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def _live(self, _: Any) -> dict[str, Any]:
        return {"live": True}

    async def _ready(self, _: Any) -> dict[str, Any]:
        return {"ready": self._catalog.ready()}

    async def _model_ready(self, message: Any) -> dict[str, Any]:
        try:
            return self._catalog.model_ready(message.name, message.version)
        except ProtocolError:
            return {"ready": False}

    async def _server(self, _: Any) -> dict[str, Any]:
        return self._catalog.server()

    async def _model(self, message: Any) -> dict[str, Any]:
        return self._catalog.model(message.name, message.version)

    async def _model_config(self, message: Any) -> dict[str, Any]:
        return {"config": self._catalog.model_config(message.name, message.version)}

    async def _statistics(self, message: Any) -> dict[str, Any]:
        return await self._catalog.statistics(message.name, message.version)

    async def _index(self, message: Any) -> dict[str, Any]:
        return {"models": await self._catalog.repository.index(message.ready)}

    async def _load(self, message: Any) -> dict[str, Any]:
        await self._catalog.repository.load(message.model_name, scalars(message.parameters))
        return {}

    async def _unload(self, message: Any) -> dict[str, Any]:
        await self._catalog.repository.unload(message.model_name, scalars(message.parameters))
        return {}


def decode(kind: Any, data: bytes) -> Any:
    """A message from its bytes.

    Raises:
        ProtocolError: 400, they are no such message.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(400, f"The message is no {kind.DESCRIPTOR.name}: {error}.") from None


def refuse(context: Any, error: Exception) -> bytes:
    """Give a call the status and the sentence of an error."""
    known = as_protocol_error(error)
    context.set_code(CODES.get(known.status, grpc.StatusCode.INTERNAL))
    context.set_details(known.message)
    if known.retry_after_s:
        context.set_trailing_metadata((("retry-after", str(known.retry_after_s)),))
    return b""


async def _not_offered(_: bytes, context: Any) -> bytes:
    context.set_code(grpc.StatusCode.UNIMPLEMENTED)
    context.set_details("This extension is not offered; see ServerMetadata.")
    return b""
