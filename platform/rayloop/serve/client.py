"""Turn images into concurrent HTTP requests, and the answers into predictions and latencies."""

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import aiohttp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.errors import WorkError
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME

REQUEST_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficReport:
    """How a round of traffic went."""

    requests: int
    """Requests that were sent."""

    failed: int
    """Those without a 200 and a whole answer."""

    seconds: float
    """From the first request to the last answer."""

    latencies_ms: NDArray[np.float64]
    """One for each answered request, in order of completion."""

    predictions: NDArray[np.int64]
    """Class index of each request, in order of sending; -1 where it failed."""

    errors: tuple[str, ...]
    """The first few failures in words."""

    def percentile_ms(self, percent: float) -> float:
        """A percentile (0..100) of the latencies in milliseconds; NaN when nothing was answered."""
        return (
            float(np.percentile(self.latencies_ms, percent)) if len(self.latencies_ms) else np.nan
        )


def send_images(
    url: str,
    images: NDArray[np.uint8],
    num_requests: int,
    num_connections: int,
    model: str = "classifier",
    clock: Clock = SYSTEM_CLOCK,
) -> TrafficReport:
    """Send single images as binary V2 requests, over and over until enough are sent.

    Each connection sends its next request when its last is answered (a closed loop). Request i
    carries image i modulo N.

    Args:
        url: Base URL of the server.
        images: uint8 [N, H, W, C].
        num_requests: Requests in all.
        num_connections: Requests under way at the same time.
        model: Name in the path.
        clock: Measures latencies.
    """
    bodies = [infer_body(image[None]) for image in images]
    return asyncio.run(_Traffic(url, bodies, num_requests, model, clock).send(num_connections))


def infer_body(images: NDArray[np.uint8]) -> tuple[bytes, int]:
    """A binary V2 request for a batch uint8 [N, H, W, C]: the body and the length of its JSON."""
    tensor = {
        "name": INPUT_NAME,
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    wanted = {"name": OUTPUT_NAME, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}, separators=(",", ":")).encode()
    return head + images.tobytes(), len(head)


def read_answer(body: bytes, head_bytes: int) -> NDArray[np.float32]:
    """Probabilities [N, K] from a binary V2 answer."""
    shape = json.loads(body[:head_bytes])["outputs"][0]["shape"]
    return np.frombuffer(body, "<f4", offset=head_bytes).reshape(shape)


async def predict_png(url: str, pixels: NDArray[np.uint8]) -> dict[str, object]:
    """Send one image [H, W, C] as a PNG to `/predict` and return the answer.

    Raises:
        WorkError: The server refused it.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)) as session,
        session.post(f"{url}/predict", data=buffer.getvalue()) as response,
    ):
        answer: dict[str, object] = await response.json()
        if response.status != 200:
            raise WorkError(f"{url}/predict answered {response.status}: {answer.get('error')}")
        return answer


class _Traffic:
    """One round of traffic while it runs."""

    def __init__(
        self,
        url: str,
        bodies: Sequence[tuple[bytes, int]],
        num_requests: int,
        model: str,
        clock: Clock,
    ) -> None:
        self._url = f"{url}/v2/models/{model}/infer"
        self._bodies = bodies
        self._clock = clock
        self._num_requests = num_requests
        self._next = count()
        self._predictions = np.full(num_requests, -1, np.int64)
        self._latencies_ms: list[float] = []
        self._errors: list[str] = []

    async def send(self, num_connections: int) -> TrafficReport:
        connector = aiohttp.TCPConnector(limit=num_connections)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        start = self._clock.monotonic()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._connection(session) for _ in range(num_connections)))
        return TrafficReport(
            requests=self._num_requests,
            failed=int((self._predictions < 0).sum()),
            seconds=self._clock.monotonic() - start,
            latencies_ms=np.asarray(self._latencies_ms),
            predictions=self._predictions,
            errors=tuple(self._errors[:5]),
        )

    async def _connection(self, session: aiohttp.ClientSession) -> None:
        while (index := next(self._next)) < self._num_requests:
            body, head_bytes = self._bodies[index % len(self._bodies)]
            start = self._clock.monotonic()
            try:
                self._predictions[index] = await self._one(session, body, head_bytes)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                self._errors.append(f"request {index}: {type(error).__name__}: {error}")
            else:
                self._latencies_ms.append((self._clock.monotonic() - start) * 1000)

    async def _one(self, session: aiohttp.ClientSession, body: bytes, head_bytes: int) -> int:
        headers = {"Inference-Header-Content-Length": str(head_bytes)}
        async with session.post(self._url, data=body, headers=headers) as response:
            content = await response.read()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {content[:200]!r}")
            head = int(response.headers["Inference-Header-Content-Length"])
            return int(read_answer(content, head)[0].argmax())
