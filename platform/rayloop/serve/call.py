"""One HTTP request while it is answered: its headers and the moment nobody waits any more."""

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rayloop.haproxy import ARRIVED
from rayloop.serve.body import Receive
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.uvicorn_cycle import client_left, is_uvicorns, whole_body

Scope = Mapping[str, Any]
T = TypeVar("T")

INLINE_BYTES = 65_536
"""Bodies up to this size are decoded on the event loop; a thread would cost more than it saves."""

LONGEST_TIMEOUT_MS = 3_600_000.0

ARRIVED_HEADER = ARRIVED.encode()
HOST = socket.gethostname()


class Call:
    """One request: its headers, its body's chunks, and its deadline.

    Args:
        scope: As ASGI gives it.
        receive: Gives the chunks.
        default_timeout_ms: Deadline of a request that names none.
        send: As ASGI gives it; uvicorn's own knows whether the client left.
    """

    def __init__(
        self, scope: Scope, receive: Receive, default_timeout_ms: float, send: Any = None
    ) -> None:
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self._cycle: Any = getattr(send, "__self__", None)
        self._loop = asyncio.get_running_loop()
        self.timeout_ms = wanted_timeout_ms(
            self.header(b"x-request-timeout-ms"), default_timeout_ms
        )
        self._started_at = self._loop.time()
        if is_uvicorns(
            self._cycle
        ):  # Serve's proxy holds what wakes a replica; that does not count
            self._started_at -= waited_s(self.header(ARRIVED_HEADER), HOST, time.time())
        self._ends_at = self._started_at + self.timeout_ms / 1000

    def header(self, name: bytes) -> str | None:
        """A header's text by its lower-case name; None when it is missing."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def text_header(self, name: bytes) -> str:
        """A header of any text: UTF-8 where it is that, else Latin-1; empty without it."""
        value = self._headers.get(name, b"")
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def gone(self) -> bool:
        """Whether the client has closed its connection.

        Only uvicorn can be asked; where Serve stands between, it cancels the request instead. To
        await the next ASGI message instead would cost a task for each request.
        """
        return client_left(self._cycle)

    def whole_body(self) -> bytes | None:
        """The body, if all of it has arrived; None where it has to be awaited."""
        return whole_body(self._cycle)

    def left_s(self, timeout_s: float | None = None) -> float:
        """Seconds until the deadline; negative once it has passed.

        Args:
            timeout_s: A shorter time, from the request's arrival, that its body asks for.
        """
        ends_at = self._ends_at
        if timeout_s is not None:
            ends_at = min(ends_at, self._started_at + timeout_s)
        return ends_at - self._loop.time()


def waited_s(stamp: str | None, host: str, now: float) -> float:
    """Seconds a request has waited since it was whole at the ingress.

    Args:
        stamp: HOST/MICROSECONDS since the epoch, as the ingress writes it; None without one.
        host: This machine's name. The clock of another machine says nothing here.
        now: Seconds since the epoch.
    """
    if stamp is None:
        return 0.0
    where, _, when = stamp.rpartition("/")
    if where != host or not (when.isascii() and when.isdigit() and len(when) < 20):
        return 0.0
    return min(max(0.0, now - int(when) / 1e6), LONGEST_TIMEOUT_MS / 1000)


def wanted_timeout_ms(text: str | None, default_ms: float) -> float:
    """The deadline a client asks for in `x-request-timeout-ms`.

    Raises:
        ProtocolError: 400, it is no number in range.
    """
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


async def near_or_far(size_bytes: int, work: Callable[[], T]) -> T:
    """Do small work here and large work in a thread, so that the loop keeps answering."""
    if size_bytes <= INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)
