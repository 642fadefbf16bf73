"""Turn the chunks of an HTTP body into its bytes, within limits that hold while it arrives."""

import math
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from rayloop.serve.admission import Limits, Refuse, admit, admit_bytes, too_large
from rayloop.serve.protocol.error import ProtocolError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


REFUSED: Counter[int] = Counter()
"""Requests refused before they were decoded, by status; of this process, which holds one replica at
most."""


class ClientGone(Exception):
    """The client closed the connection before its request was whole; nobody waits for an answer."""


class BodyGate:
    """Admits, reads and counts the bodies that one replica holds at the same time.

    Args:
        limits: What the replica takes.
        queued_rows: Asks how many rows wait now.
        wait_s: Asks how many seconds those will take.
    """

    def __init__(
        self,
        limits: Limits,
        queued_rows: Callable[[], int],
        wait_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.limits = limits
        self._queued_rows = queued_rows
        self._wait_s = wait_s
        self.inflight_bytes = 0

    def check(self, content_length: str | None, left_s: float = math.inf) -> None:
        """Refuse by the headers alone, before anything is read.

        Args:
            content_length: The header's text.
            left_s: Seconds until nobody waits for an answer.

        Raises:
            ProtocolError: 400, 413 or 429.
        """
        decision = admit(
            self.limits,
            queued_rows=self._queued_rows(),
            inflight_bytes=self.inflight_bytes,
            content_length=content_length,
            wait_s=self._wait_s(),
            left_s=left_s,
        )
        if isinstance(decision, Refuse):
            raise refusal(decision)

    @contextmanager
    def holding(self) -> Iterator["HeldBody"]:
        """Count a body for as long as it is held."""
        held = HeldBody(self, self.limits)
        try:
            yield held
        finally:
            self.inflight_bytes -= held.size


class HeldBody:
    """One body while it is read and used."""

    def __init__(self, gate: BodyGate, limits: Limits) -> None:
        self._gate = gate
        self._limits = limits
        self.size = 0

    async def read(self, receive: Receive) -> bytes:
        """All bytes of the body.

        Raises:
            ProtocolError: 413 or 429, it grew beyond a limit.
            ClientGone: The client left.
        """
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            if chunk:
                self.take(len(chunk))
                chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def take(self, more: int) -> None:
        """Count bytes of the body as it was sent.

        Raises:
            ProtocolError: 413 or 429, it grew beyond a limit.
        """
        self.count(more)
        if self.size > self._limits.max_body_bytes:
            raise refusal(too_large(self._limits))

    def count(self, more: int) -> None:
        """Count bytes that are held from now on for this request.

        Raises:
            ProtocolError: 429, this and others hold too many.
        """
        self.size += more
        self._gate.inflight_bytes += more
        decision = admit_bytes(self._limits, self._gate.inflight_bytes)
        if isinstance(decision, Refuse):
            raise refusal(decision)


def decompress(body: bytes, content_encoding: str, max_bytes: int) -> bytes:
    """A body as it was before `Content-Encoding`.

    Args:
        body: The bytes as sent.
        content_encoding: `gzip`, `deflate`, `identity` or empty.
        max_bytes: Largest size after decompression.

    Raises:
        ProtocolError: 400 damaged, 413 too large once decompressed, 415 another encoding.
    """
    encoding = content_encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise ProtocolError(415, f"Content-Encoding {encoding[:40]!r} is unknown; use gzip.")
    stream = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(400, f"The {encoding} body is damaged: {error}.") from error
    if len(plain) > max_bytes:
        raise ProtocolError(413, f"The body is over {max_bytes} bytes once decompressed.")
    if not stream.eof or stream.unused_data:
        raise ProtocolError(400, f"The {encoding} body is cut short, or bytes follow it.")
    return plain


def refusal(decision: Refuse) -> ProtocolError:
    """The error that answers a refused request; it is counted here."""
    REFUSED[decision.status] += 1
    return ProtocolError(decision.status, decision.message, decision.retry_after_s)
