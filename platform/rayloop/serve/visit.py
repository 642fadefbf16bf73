"""A request between its assignment and its answer, and the event it becomes."""

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.batcher import RequestTimes
from rayloop.serve.events.event import PredictionEvent, Verdict
from rayloop.serve.variant import Variant


class Visit:
    """One request and the variant it was given to."""

    __slots__ = ("forced", "plan", "start", "times", "unit", "variant")

    def __init__(self, variant: Variant, plan: int, unit: str, forced: bool, start: float) -> None:
        self.variant, self.plan, self.unit, self.forced = variant, plan, unit, forced
        self.start = start
        self.times = RequestTimes()

    def event(
        self,
        prediction_id: str,
        now: float,
        latency_ms: float,
        status: int,
        images: NDArray[np.uint8],
        probabilities: NDArray[np.float32] | None = None,
        decisions: tuple[Verdict, ...] = (),
        versions: tuple[str, ...] = (),
    ) -> PredictionEvent:
        """What is remembered of it.

        Args:
            prediction_id: Its name.
            now: Seconds since the epoch.
            latency_ms: From its arrival to now.
            status: HTTP status of the answer.
            images: uint8 [N, H, W, C].
            probabilities: float32 [N, K]; None when it failed.
            decisions: One a row; empty when it failed.
            versions: What answered each row; empty where the variant's own version did.
        """
        variant, times = self.variant, self.times
        return PredictionEvent(
            prediction_id=prediction_id,
            time=now,
            model=variant.spec.model,
            plan=self.plan,
            unit=self.unit,
            variant=variant.name,
            assigned_version=variant.spec.version,
            forced=self.forced,
            status=status,
            images=images,
            probabilities=probabilities,
            decisions=decisions,
            versions=versions,
            latency_ms=latency_ms,
            queue_ms=times.queue_ms,
            engine_ms=times.engine_ms,
        )
