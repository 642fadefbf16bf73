"""Turn results and errors into the status, headers and body of an HTTP answer."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayloop.logs import stage_logger
from rayloop.serve.batcher import DeadlinePassed, QueueFull, Stopping
from rayloop.serve.body import Message
from rayloop.serve.execution import EngineFailed
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.uvicorn_cycle import write_at_once
from rayloop.serve.variant import Prediction

log = stage_logger("serve")

Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: a status, a body, and headers beyond its type and length."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content_type: bytes = b"application/json"


def json_answer(
    document: Mapping[str, Any] | list[Any], headers: list[tuple[bytes, bytes]] | None = None
) -> Answer:
    """A document as a 200."""
    return Answer(200, json.dumps(document).encode(), headers or [])


def error_answer(error: Exception) -> Answer:
    """The one shape every error has: a status and `{"error": "..."}`."""
    known = as_protocol_error(error)
    headers = []
    if known.retry_after_s:
        headers.append((b"retry-after", str(known.retry_after_s).encode()))
    return Answer(known.status, known.body(), headers)


def who_answered(prediction: Prediction) -> list[tuple[bytes, bytes]]:
    """The headers that say which version and variant answered, and under which id."""
    return [
        (b"x-rayloop-version", prediction.version.encode()),
        (b"x-rayloop-variant", prediction.variant.name.encode()),
        (b"x-rayloop-prediction-id", prediction.prediction_id.encode()),
    ]


def who_answered_parameters(prediction: Prediction) -> dict[str, str]:
    """The same in the parameters of an answer, which exist in both protocols.

    Rows that the fallback version answered and rows to review are named, from 0, if there are any.
    """
    told = {
        "rayloop_variant": prediction.variant.name,
        "rayloop_prediction_id": prediction.prediction_id,
    }
    if prediction.second:
        told["rayloop_fallback_rows"] = ",".join(map(str, prediction.second))
        told["rayloop_fallback_version"] = prediction.fallback
    if "review" in prediction.decisions:
        doubtful = (str(row) for row, what in enumerate(prediction.decisions) if what == "review")
        told["rayloop_review_rows"] = ",".join(doubtful)
    return told


async def send_answer(send: Send, answer: Answer, head_only: bool) -> None:
    """Put an answer on the wire; to HEAD without its body."""
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", str(len(answer.body)).encode()),
        *answer.headers,
    ]
    body = b"" if head_only else answer.body
    if write_at_once(getattr(send, "__self__", None), answer.status, headers, body):
        return
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def as_protocol_error(error: Exception) -> ProtocolError:
    """The status and the sentence for an error, whichever protocol carries it.

    An error nobody foresaw is logged with its traceback and becomes a 500 without its details.
    """
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, QueueFull):
        return ProtocolError(429, str(error), 1)
    if isinstance(error, DeadlinePassed):
        return ProtocolError(504, str(error))
    if isinstance(error, Stopping):
        return ProtocolError(503, str(error), 1)
    if isinstance(error, EngineFailed):
        log.error("%s", error)
        return ProtocolError(500, str(error))
    log.error("an unforeseen error answered with 500", exc_info=error)
    return ProtocolError(500, "The server met an error of its own; its log has the details.")
