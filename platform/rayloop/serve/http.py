"""Turn HTTP requests into predictions: a plain ASGI application without a framework's overhead."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.config import ServeConfig
from rayloop.serve.admission import Limits
from rayloop.serve.batcher import Abandoned, DeadlinePassed
from rayloop.serve.body import BodyGate, ClientGone, HeldBody, Receive, decompress
from rayloop.serve.call import Call, Scope, near_or_far
from rayloop.serve.catalog import Catalog
from rayloop.serve.encoding import WORTH_BYTES, compress, wanted_encoding
from rayloop.serve.exposition import CONTENT_TYPE
from rayloop.serve.images import decode_image
from rayloop.serve.multipart import file_field
from rayloop.serve.protocol.answer import infer_answer
from rayloop.serve.protocol.infer import KnownHeads, load_object, parse_infer
from rayloop.serve.protocol.openapi import openapi_document
from rayloop.serve.protocol.parameters import NOTHING_ASKED, Schedule, flag
from rayloop.serve.protocol.request import malformed
from rayloop.serve.reply import (
    Answer,
    Send,
    error_answer,
    json_answer,
    send_answer,
    who_answered,
    who_answered_parameters,
)
from rayloop.serve.routes import Action, Route, find_route
from rayloop.serve.service import ModelService, not_loaded
from rayloop.serve.variant import Prediction

INFLATING_AT_ONCE = 2
"""Compressed bodies that may be inflated at the same time, so that bombs cannot add up."""


class InferenceApp:
    """The HTTP face of one replica.

    Args:
        service: Makes predictions.
        config: Limits and thresholds.
        catalog: Answers questions about the model; made from the service when it is not given.
        on_close: Awaited at the end, before the service closes.
    """

    def __init__(
        self,
        service: ModelService,
        config: ServeConfig,
        catalog: Catalog | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._catalog = catalog or Catalog(service, config)
        self._on_close = on_close
        self._gate = BodyGate(
            Limits.of(config), lambda: service.queued_rows, lambda: service.wait_s
        )
        self._known = KnownHeads()
        self._inflating = asyncio.Semaphore(INFLATING_AT_ONCE)

    def limit(self, config: ServeConfig) -> None:
        """Let in what other limits allow; bodies that are being read keep theirs."""
        self._config = config
        self._gate.limits = Limits.of(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope; nothing but cancellation leaves it as an exception."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        try:
            answer = await self._answer(scope, receive, send)
        except (Abandoned, ClientGone):
            return
        except Exception as error:  # every error gets its answer
            answer = error_answer(error)
        if len(answer.body) >= WORTH_BYTES:
            answer = await _encoded(answer, scope)
        await send_answer(send, answer, scope["method"] == "HEAD")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._on_close is not None:
                    await self._on_close()
                await self._service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Answer:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = find_route(scope["method"], path)
        if route.action is Action.INFER:
            self._catalog.find(route.model, route.version)
        elif route.action is not Action.PREDICT:
            return await self._tell(route, scope, receive)
        call = Call(scope, receive, self._config.default_timeout_ms, send)
        self._gate.check(call.header(b"content-length"), call.left_s())
        with self._gate.holding() as held:
            body = await self._body(call, held)
            if route.action is Action.INFER:
                return await self._infer(call, body, route)
            return await self._predict(call, body)

    async def _tell(self, route: Route, scope: Scope, receive: Receive) -> Answer:
        """Answer everything that is no prediction."""
        catalog, model, version = self._catalog, route.model, route.version
        match route.action:
            case Action.LIVE:
                return json_answer({"live": True})
            case Action.READY:
                if not catalog.ready():
                    raise not_loaded(self._service.spec)
                return json_answer({"ready": True})
            case Action.SERVER:
                return json_answer(catalog.server())
            case Action.OPENAPI:
                return json_answer(openapi_document(self._service.spec))
            case Action.MODEL:
                return json_answer(catalog.model(model, version))
            case Action.MODEL_READY:
                return json_answer(catalog.model_ready(model, version))
            case Action.MODEL_CONFIG:
                return json_answer(catalog.model_config(model, version))
            case Action.STATISTICS:
                return json_answer(await catalog.statistics(model, version))
            case Action.STATUS:
                return json_answer({"replicas": await catalog.snapshots()})
            case Action.METRICS:
                text = await catalog.metrics()
                return Answer(200, text, [], CONTENT_TYPE)
            case _:
                return await self._change(route, scope, receive)

    async def _change(self, route: Route, scope: Scope, receive: Receive) -> Answer:
        call = Call(scope, receive, self._config.default_timeout_ms)
        self._gate.check(call.header(b"content-length"))
        with self._gate.holding() as held:
            body = await self._body(call, held)
        if route.action is Action.FEEDBACK:
            return json_answer(await self._catalog.learn(body))
        document = load_object(body) if body.strip() else {}
        repository = self._catalog.repository
        if route.action is Action.INDEX:
            return json_answer(await repository.index(flag(document, "ready")))
        parameters = document.get("parameters", {})
        if not isinstance(parameters, dict):
            malformed("`parameters` must be a JSON object.")
        if route.action is Action.LOAD:
            await repository.load(route.model, parameters)
        else:
            await repository.unload(route.model, parameters)
        return json_answer({})

    async def _body(self, call: Call, held: HeldBody) -> bytes:
        body = call.whole_body()
        if body is None:
            try:
                async with asyncio.timeout(call.left_s()):
                    body = await held.read(call.receive)
            except TimeoutError:
                raise DeadlinePassed(
                    f"The body was not whole within {call.timeout_ms:.0f} ms; give more time."
                ) from None
        else:
            held.take(len(body))
        encoding = call.header(b"content-encoding")
        if encoding is None:
            return body
        async with self._inflating:
            limit = self._config.max_body_bytes
            plain = await asyncio.to_thread(decompress, body, encoding, limit)
            held.count(len(plain))
        return plain

    async def _infer(self, call: Call, body: bytes, route: Route) -> Answer:
        request = await near_or_far(
            len(body),
            lambda: parse_infer(
                body,
                call.header(b"inference-header-content-length"),
                self._service.find(route.version).spec,
                self._config.max_rows_per_request,
                self._known,
            ),
        )
        prediction = await self._run(call, request.images, request.schedule, route.version)
        content, head_bytes = infer_answer(
            prediction.probabilities,
            prediction.spec,
            request.request_id,
            request.output,
            who_answered_parameters(prediction),
        )
        headers = who_answered(prediction)
        if head_bytes is None:
            return Answer(200, content, headers)
        headers.append((b"inference-header-content-length", str(head_bytes).encode()))
        return Answer(200, content, headers, b"application/octet-stream")

    async def _predict(self, call: Call, body: bytes) -> Answer:
        spec = self._service.find().spec
        content_type = call.header(b"content-type") or ""
        if content_type.lower().startswith("multipart/form-data"):
            body = file_field(content_type, body)
        pixels = await near_or_far(
            max(len(body), spec.row_bytes), lambda: decode_image(body, spec.shape)
        )
        prediction = await self._run(call, pixels[None], NOTHING_ASKED, "")
        return json_answer(self._describe(prediction), who_answered(prediction))

    async def _run(
        self, call: Call, images: NDArray[np.uint8], schedule: Schedule, version: str
    ) -> Prediction:
        return await self._service.predict(
            images,
            unit=call.text_header(b"x-rayloop-unit") or schedule.unit,
            forced=call.header(b"x-rayloop-variant") or schedule.variant,
            timeout_s=call.left_s(schedule.timeout_s),
            version=version,
            priority=schedule.priority,
            gone=call.gone,
        )

    def _describe(self, prediction: Prediction) -> dict[str, Any]:
        values = prediction.probabilities[0]
        index = int(values.argmax())
        spec = prediction.variant.spec
        return {
            "prediction_id": prediction.prediction_id,
            "model": spec.model,
            "version": prediction.version,
            "variant": prediction.variant.name,
            "label": spec.class_names[index],
            "class_index": index,
            "confidence": float(values[index]),
            "probabilities": values.tolist(),
            "decision": prediction.decisions[0],
        }


async def _encoded(answer: Answer, scope: Scope) -> Answer:
    """A large answer in the encoding its client accepts, where that makes it smaller."""
    accept = b",".join(value for name, value in scope["headers"] if name == b"accept-encoding")
    encoding = wanted_encoding(accept.decode("latin-1")) if accept else ""
    if not encoding:
        return answer
    body = await near_or_far(len(answer.body), lambda: compress(answer.body, encoding))
    if len(body) >= len(answer.body):
        return answer
    headers = [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
    return Answer(answer.status, body, answer.headers + headers, answer.content_type)
