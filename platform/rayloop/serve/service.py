"""Turn an image batch into a prediction: choose the variant, run its engine, note what happened."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock, iso_utc
from rayloop.config import ServeConfig
from rayloop.serve.batcher import Batcher
from rayloop.serve.events import PredictionEvent, decide
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.traffic import TrafficPlan

EventSink = Callable[[PredictionEvent], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that is loaded, with the queue in front of it."""

    name: str
    spec: ModelSpec
    batcher: Batcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one request gets back."""

    prediction_id: str
    variant: Variant
    probabilities: NDArray[np.float32]
    """float32 [N, K]."""


class ModelService:
    """The variants of one model in one replica.

    Args:
        variants: Loaded models by name; all take the same images.
        plan: Which variant answers whom.
        config: Thresholds of the decision.
        clock: For the times in events.
        new_id: Makes a fresh prediction id.
        sink: Receives an event for each row; None makes no events.
    """

    def __init__(
        self,
        variants: dict[str, Variant],
        plan: TrafficPlan,
        config: ServeConfig,
        clock: Clock,
        new_id: Callable[[], str],
        sink: EventSink | None = None,
    ) -> None:
        self._variants = variants
        self._plan = plan
        self._config = config
        self._clock = clock
        self._new_id = new_id
        self._sink = sink
        self.spec = variants[plan.names[0]].spec

    @property
    def queued_rows(self) -> int:
        """Rows that wait, over all variants."""
        return sum(variant.batcher.queued_rows for variant in self._variants.values())

    def variant_for(self, unit: str, prediction_id: str, forced: str) -> Variant:
        """The variant that answers a request.

        Raises:
            ProtocolError: 404, the client asks for a variant that is not there.
        """
        if not forced:
            return self._variants[self._plan.assign(unit or prediction_id)]
        if forced not in self._variants:
            raise ProtocolError(
                404, f"Variant {forced[:60]!r} is unknown; there are {', '.join(self._variants)}."
            )
        return self._variants[forced]

    async def predict(
        self, images: NDArray[np.uint8], *, unit: str, forced: str, timeout_s: float
    ) -> Prediction:
        """Probabilities of an image batch, and its events.

        Args:
            images: uint8 [N, H, W, C].
            unit: Who the request is for; empty when nobody is named.
            forced: Name of the variant to use; empty leaves the choice to the plan.
            timeout_s: Seconds until nobody waits any more.
        """
        prediction_id = self._new_id()
        variant = self.variant_for(unit, prediction_id, forced)
        start = self._clock.monotonic()
        probabilities = await variant.batcher.submit(images, timeout_s)
        prediction = Prediction(
            prediction_id=prediction_id, variant=variant, probabilities=probabilities
        )
        if self._sink is not None:
            self._emit(self._sink, prediction, unit, bool(forced), start)
        return prediction

    async def close(self) -> None:
        """Finish what runs and stop the engines' threads."""
        for variant in self._variants.values():
            await variant.batcher.close()

    def _emit(
        self, sink: EventSink, prediction: Prediction, unit: str, forced: bool, start: float
    ) -> None:
        latency_ms = (self._clock.monotonic() - start) * 1000
        now = iso_utc(self._clock.now())
        for row, values in enumerate(prediction.probabilities):
            index = int(values.argmax())
            confidence = float(values[index])
            sink(
                PredictionEvent(
                    prediction_id=prediction.prediction_id,
                    row=row,
                    time=now,
                    model=prediction.variant.spec.model,
                    version=prediction.variant.spec.version,
                    variant=prediction.variant.name,
                    unit=unit,
                    forced=forced,
                    class_index=index,
                    confidence=confidence,
                    decision=decide(confidence, self._config),
                    latency_ms=latency_ms,
                )
            )
