"""What uvicorn knows of a request beyond ASGI: whether its client left, and its socket.

ASGI sends an answer in two messages, and uvicorn writes each to the socket by itself, after
checking every header. For answers of a few hundred bytes that is a fifth of the server's CPU time,
and the ingress reads twice. What is not uvicorn's own object, as behind Serve's handling or in a
test, is left to ASGI.
"""

from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


def is_uvicorns(cycle: object) -> bool:
    """Whether this is uvicorn's own object, with nothing of Serve's between."""
    return isinstance(cycle, RequestResponseCycle)


def client_left(cycle: object) -> bool:
    """Whether the client has closed its connection; False where uvicorn cannot be asked."""
    return isinstance(cycle, RequestResponseCycle) and cycle.disconnected


def whole_body(cycle: object) -> bytes | None:
    """The request's body if all of it has arrived; None where it has to be awaited."""
    if not isinstance(cycle, RequestResponseCycle) or cycle.more_body or cycle.disconnected:
        return None
    body = bytes(cycle.body)
    cycle.body = bytearray()
    cycle.flow.resume_reading()  # else a long body would hide that the client leaves
    return body


def write_at_once(
    cycle: object, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> bool:
    """Send a whole answer in one write, and leave uvicorn's object as its own `send` would.

    Args:
        cycle: What `send` is bound to.
        status: HTTP status.
        headers: Lower-case names; with `content-length`, without line breaks.
        body: The body; empty for HEAD.

    Returns:
        False where nothing was done: it is not uvicorn's object, or the socket is clogged.
    """
    if not isinstance(cycle, RequestResponseCycle) or cycle.flow.write_paused:
        return False
    if cycle.response_started or cycle.disconnected:
        return cycle.disconnected
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    parts: list[Any] = [STATUS_LINE[status]]
    for name, value in (*cycle.default_headers, *headers):
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    parts.append(body)
    cycle.transport.write(b"".join(parts))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
