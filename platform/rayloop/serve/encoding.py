"""Turn an answer's body into the encoding its client asked for with `Accept-Encoding`."""

import gzip
import zlib

WORTH_BYTES = 1024
"""Bodies from this size are compressed; most HTTP libraries ask for it without knowing."""

LEVEL = 1
ENCODINGS = ("gzip", "deflate")


def wanted_encoding(accept: str) -> str:
    """The encoding to answer in: `gzip`, `deflate`, or empty for none.

    Args:
        accept: The header `Accept-Encoding`.
    """
    weights: dict[str, float] = {}
    for part in accept.lower().split(",")[:20]:
        name, _, parameters = part.partition(";")
        weights[name.strip()] = _weight(parameters)
    best, best_weight = "", 0.0
    for encoding in ENCODINGS:
        weight = weights.get(encoding, weights.get("*", 0.0))
        if weight > best_weight:
            best, best_weight = encoding, weight
    return "" if weights.get("identity", 0.0) > best_weight else best


def compress(body: bytes, encoding: str) -> bytes:
    """A body in `gzip` or `deflate` (zlib's format, as HTTP means it)."""
    if encoding == "gzip":
        return gzip.compress(body, LEVEL, mtime=0)
    return zlib.compress(body, LEVEL)


def _weight(parameters: str) -> float:
    name, _, value = parameters.strip().partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return min(1.0, max(0.0, float(value)))
    except ValueError:
        return 0.0
