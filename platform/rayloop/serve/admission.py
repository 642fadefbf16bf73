"""Decide, before any of a body is read or decoded, whether a request may come in."""

import math
from dataclasses import dataclass

from rayloop.config import ServeConfig

INFLIGHT_BODIES = 4
"""Bodies of the largest size that may be held at once; more small ones fit."""


@dataclass(frozen=True, slots=True)
class Admit:
    """The request may come in."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is answered at once with a status and a reason.

    `retry_after_s` is for the header of that name; 0 leaves it out.
    """

    status: int
    message: str
    retry_after_s: int = 0


Decision = Admit | Refuse
ADMIT = Admit()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one replica takes."""

    max_body_bytes: int
    """Largest body."""

    max_queued_rows: int
    """Rows that may wait."""

    @classmethod
    def of(cls, config: ServeConfig) -> "Limits":
        """Those of the serving settings."""
        return cls(max_body_bytes=config.max_body_bytes, max_queued_rows=config.max_queued_rows)

    @property
    def max_inflight_bytes(self) -> int:
        """Bytes of bodies that may be held at once."""
        return INFLIGHT_BODIES * self.max_body_bytes


def admit(
    limits: Limits,
    *,
    queued_rows: int,
    inflight_bytes: int,
    content_length: str | None,
    wait_s: float = 0.0,
    left_s: float = math.inf,
) -> Decision:
    """Decide on the headers alone.

    Args:
        limits: What the replica takes.
        queued_rows: Rows that wait now.
        inflight_bytes: Bytes of bodies held now.
        content_length: The header's text; None when the body comes in chunks of unknown total.
        wait_s: Seconds until the rows that wait now are done, as far as known.
        left_s: Seconds until nobody waits for this request's answer.
    """
    declared = 0
    if content_length is not None:
        if not (content_length.isascii() and content_length.isdigit() and len(content_length) < 20):
            return Refuse(400, f"Content-Length {content_length[:40]!r} is not a number of bytes.")
        declared = int(content_length)
    if declared > limits.max_body_bytes:
        return too_large(limits)
    if queued_rows >= limits.max_queued_rows:
        return Refuse(429, f"{queued_rows} rows wait already; try again shortly.", 1)
    if wait_s > 0 and wait_s > left_s:
        return late(wait_s, left_s)
    return admit_bytes(limits, inflight_bytes + declared)


def admit_bytes(limits: Limits, inflight_bytes: int) -> Decision:
    """Decide whether the bodies held at once still fit; asked again while a body streams in."""
    if inflight_bytes > limits.max_inflight_bytes:
        return Refuse(429, "Too many large bodies are being read; try again shortly.", 1)
    return ADMIT


def late(wait_s: float, left_s: float) -> Refuse:
    """The answer to a request that could not be done before its deadline."""
    return Refuse(
        429,
        f"What waits already takes {wait_s * 1000:.0f} ms, and the request has "
        f"{max(0.0, left_s) * 1000:.0f} ms left; try again shortly.",
        1,
    )


def too_large(limits: Limits) -> Refuse:
    """The answer to a body beyond the limit."""
    return Refuse(413, f"The body is too large; send at most {limits.max_body_bytes} bytes.")
