"""Turn HTTP requests into predictions: a plain ASGI application without a framework's overhead."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayloop import __version__
from rayloop.config import ServeConfig
from rayloop.serve.admission import Limits
from rayloop.serve.batcher import DeadlinePassed
from rayloop.serve.body import BodyGate, ClientGone, HeldBody, Receive, decompress
from rayloop.serve.events import decide
from rayloop.serve.images import decode_image
from rayloop.serve.multipart import file_field
from rayloop.serve.protocol.answer import infer_answer
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.infer import parse_infer
from rayloop.serve.protocol.spec import model_document, server_document
from rayloop.serve.reply import (
    Answer,
    Send,
    error_answer,
    json_answer,
    send_answer,
    who_answered,
)
from rayloop.serve.routes import Route, find_route
from rayloop.serve.service import ModelService, Prediction

Scope = Mapping[str, Any]
T = TypeVar("T")

INLINE_BYTES = 65_536
"""Bodies up to this size are decoded on the event loop; a thread would cost more than it saves."""

LONGEST_TIMEOUT_MS = 3_600_000.0


class Call:
    """One request: its headers, its body's chunks, and the moment nobody waits any more."""

    def __init__(self, scope: Scope, receive: Receive, default_timeout_ms: float) -> None:
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self._loop = asyncio.get_running_loop()
        self.timeout_ms = self._wanted_timeout_ms(default_timeout_ms)
        self._ends_at = self._loop.time() + self.timeout_ms / 1000

    def header(self, name: bytes) -> str | None:
        """A header's text by its lower-case name; None when it is missing."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def left_s(self) -> float:
        """Seconds until the deadline; negative once it has passed."""
        return self._ends_at - self._loop.time()

    def _wanted_timeout_ms(self, default_ms: float) -> float:
        text = self.header(b"x-request-timeout-ms")
        if text is None:
            return default_ms
        try:
            timeout_ms = float(text)
        except ValueError:
            timeout_ms = -1.0
        if not 0 < timeout_ms <= LONGEST_TIMEOUT_MS:
            raise ProtocolError(
                400,
                f"x-request-timeout-ms {text[:40]!r} must be a number of milliseconds above 0 and "
                f"up to {LONGEST_TIMEOUT_MS:.0f}.",
            )
        return timeout_ms


class InferenceApp:
    """The HTTP face of one replica.

    Args:
        service: Makes predictions.
        config: Limits and thresholds.
    """

    def __init__(self, service: ModelService, config: ServeConfig) -> None:
        self._service = service
        self._config = config
        limits = Limits(
            max_body_bytes=config.max_body_bytes, max_queued_rows=config.max_queued_rows
        )
        self._gate = BodyGate(limits, lambda: service.queued_rows)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope; nothing but cancellation leaves it as an exception."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        try:
            answer = await self._answer(scope, receive)
        except ClientGone:
            return
        except Exception as error:  # every error gets its answer
            answer = error_answer(error)
        await send_answer(send, answer, scope["method"] == "HEAD")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        spec = self._service.spec
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = find_route(scope["method"], path, spec)
        if route is Route.SERVER:
            return json_answer(server_document(__version__), [])
        if route is Route.MODEL:
            return json_answer(model_document(spec), [])
        if route is Route.LIVE:
            return json_answer({"live": True}, [])
        if route in (Route.READY, Route.MODEL_READY):
            return json_answer({"ready": True}, [])
        call = Call(scope, receive, self._config.default_timeout_ms)
        self._gate.check(call.header(b"content-length"))
        with self._gate.holding() as held:
            body = await self._body(call, held)
            if route is Route.INFER:
                return await self._infer(call, body)
            return await self._predict(call, body)

    async def _body(self, call: Call, held: HeldBody) -> bytes:
        try:
            async with asyncio.timeout(call.left_s()):
                body = await held.read(call.receive)
        except TimeoutError:
            raise DeadlinePassed(
                f"The body was not whole within {call.timeout_ms:.0f} ms; give more time."
            ) from None
        encoding = call.header(b"content-encoding")
        if encoding is None:
            return body
        return await asyncio.to_thread(decompress, body, encoding, self._config.max_body_bytes)

    async def _infer(self, call: Call, body: bytes) -> Answer:
        request = await _near_or_far(
            len(body),
            lambda: parse_infer(
                body,
                call.header(b"inference-header-content-length"),
                self._service.spec,
                self._config.max_rows_per_request,
            ),
        )
        prediction = await self._run(call, request.images)
        content, head_bytes = infer_answer(
            prediction.probabilities,
            prediction.variant.spec,
            request.request_id,
            request.binary_output,
        )
        headers = who_answered(prediction)
        if head_bytes is None:
            return Answer(200, content, headers)
        headers.append((b"inference-header-content-length", str(head_bytes).encode()))
        return Answer(200, content, headers, b"application/octet-stream")

    async def _predict(self, call: Call, body: bytes) -> Answer:
        spec = self._service.spec
        content_type = call.header(b"content-type") or ""
        if content_type.lower().startswith("multipart/form-data"):
            body = file_field(content_type, body)
        pixels = await _near_or_far(
            max(len(body), spec.row_bytes), lambda: decode_image(body, spec.shape)
        )
        prediction = await self._run(call, pixels[None])
        return json_answer(self._describe(prediction), who_answered(prediction))

    async def _run(self, call: Call, images: NDArray[np.uint8]) -> Prediction:
        return await self._service.predict(
            images,
            unit=call.header(b"x-rayloop-unit") or "",
            forced=call.header(b"x-rayloop-variant") or "",
            timeout_s=call.left_s(),
        )

    def _describe(self, prediction: Prediction) -> dict[str, Any]:
        values = prediction.probabilities[0]
        index = int(values.argmax())
        spec = prediction.variant.spec
        return {
            "prediction_id": prediction.prediction_id,
            "model": spec.model,
            "version": spec.version,
            "variant": prediction.variant.name,
            "label": spec.class_names[index],
            "class_index": index,
            "confidence": float(values[index]),
            "probabilities": values.tolist(),
            "decision": decide(float(values[index]), self._config),
        }


async def _near_or_far(size_bytes: int, work: Callable[[], T]) -> T:
    """Do small work here and large work in a thread, so that the loop keeps answering."""
    if size_bytes <= INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)
