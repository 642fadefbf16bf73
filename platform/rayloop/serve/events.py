"""Turn one prediction into the record that monitoring, rollout and the flywheel read."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rayloop.config import ServeConfig

Verdict = Literal["accept", "fallback", "review"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionEvent:
    """What was predicted for one row, by what, and how it went."""

    prediction_id: str
    """Name of the request; labels that arrive later refer to it."""

    row: int
    """Place of the row in its request, from 0."""

    time: str
    """When it was answered, ISO 8601 in UTC."""

    model: str
    version: str
    variant: str
    """Variant of the traffic plan that answered."""

    unit: str
    """Who the request was for; empty when the client named nobody."""

    forced: bool
    """The client chose the variant, so statistics leave it out."""

    class_index: int
    """Class with the highest probability."""

    confidence: float
    """Its probability, 0..1."""

    decision: Verdict
    latency_ms: float
    """From the last byte of the request to the answer."""

    def to_json(self) -> dict[str, Any]:
        """The event as plain values, ready for JSON."""
        return asdict(self)


def decide(confidence: float, config: ServeConfig) -> Verdict:
    """What to do with a prediction: take it, ask a larger model, or ask a person.

    Args:
        confidence: Highest probability, 0..1.
        config: Holds the two thresholds.
    """
    if confidence >= config.accept_confidence:
        return "accept"
    return "review" if confidence < config.review_confidence else "fallback"
