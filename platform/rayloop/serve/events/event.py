"""Turn one answered request into the record that monitoring, rollout and the flywheel read."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["accept", "fallback", "review"]


@dataclass(kw_only=True, slots=True, eq=False)
class PredictionEvent:
    """What was predicted for the images of one request, by what, and how it went.

    It refers to arrays that exist anyway and computes nothing, since it is made on the event loop.
    `event_table` turns events into rows, one an image.
    """

    prediction_id: str
    """Name of the request, 32 hexadecimal digits: 16 of the replica, then a counter. Labels that
    arrive later refer to it."""

    time: float
    """When it was answered, seconds since the epoch."""

    model: str
    plan: int
    """Number of the traffic plan that assigned the variant."""

    unit: str
    """Who the request was for; empty when the client named nobody."""

    variant: str
    """Variant assigned before inference, whatever answered in the end."""

    assigned_version: str
    """The variant's version at that time."""

    forced: bool
    """The client chose the variant or the version, so statistics leave it out."""

    status: int
    """HTTP status of the answer: 200; 500 or 504 when the engine failed or the deadline passed
    after the assignment."""

    images: NDArray[np.uint8]
    """uint8 [N, H, W, C], not copied: nobody may write into it any more."""

    probabilities: NDArray[np.float32] | None
    """float32 [N, K]; None when the request failed."""

    decisions: tuple[Verdict, ...]
    """What to do with each row's prediction; empty when the request failed."""

    versions: tuple[str, ...]
    """The version that answered each row; empty when `assigned_version` answered all."""

    latency_ms: float
    """From the last byte of the request to the answer; NaN where unknown."""

    queue_ms: float
    """The part of it spent waiting for the engine; NaN where unknown."""

    engine_ms: float
    """The part of it spent in the engine; NaN where unknown."""
