"""Turn doubtful rows into the answer of a larger version, or into a mark for a person."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayloop.errors import WorkError
from rayloop.serve.batcher import Batcher, still_there
from rayloop.serve.events.event import Verdict
from rayloop.serve.execution import Answers, Rows
from rayloop.serve.traffic.confidence import FallbackCap, doubtful_rows
from rayloop.serve.traffic.plan import LowConfidence


@dataclass(frozen=True, slots=True)
class Settled:
    """The answer to a request after doubtful rows were looked at again."""

    probabilities: NDArray[np.float32]
    """float32 [N, K]."""

    decisions: tuple[Verdict, ...]
    """One for each row."""

    second: tuple[int, ...] = ()
    """Rows that the larger version answered."""


@dataclass(slots=True)
class SecondOpinion:
    """What a plan says about doubtful rows, at work."""

    policy: LowConfidence
    capped: int = field(default=0, init=False)
    """Rows that would have fallen back, beyond the share that may."""

    failed: int = field(default=0, init=False)
    """Rows that the larger version did not answer; they keep their first answer."""

    cap: FallbackCap = field(init=False)

    def __post_init__(self) -> None:
        self.cap = FallbackCap(self.policy.max_share)

    def doubtful(self, probabilities: Answers) -> list[int]:
        """The rows to look at again; to be asked once for each answered request."""
        self.cap.seen(len(probabilities))
        return doubtful_rows(probabilities, self.policy.below)

    async def settle(
        self,
        larger: Batcher | None,
        images: Rows,
        probabilities: Answers,
        doubtful: list[int],
        timeout_s: float,
        priority: int,
        gone: Callable[[], bool] = still_there,
    ) -> Settled:
        """Ask the larger version as far as the share allows.

        Whatever goes wrong there, the first answer stays, marked for review.

        Args:
            larger: The queue of the fallback version; None when there is none, or it is unloaded.
            images: uint8 [N, H, W, C].
            probabilities: float32 [N, K], the first answer.
            doubtful: Rows to look at again, at least one.
            timeout_s: Seconds after which the first answer is given as it is.
            priority: The request's.
            gone: Asked before the larger version works: whether nobody waits any more.
        """
        decisions: list[Verdict] = ["accept"] * len(probabilities)
        for row in doubtful:
            decisions[row] = "review"
        if larger is None:
            return Settled(probabilities, tuple(decisions))
        chosen = doubtful[: self.cap.take(len(doubtful))]
        self.capped += len(doubtful) - len(chosen)
        if not chosen:
            return Settled(probabilities, tuple(decisions))
        try:
            answers = await larger.submit(images[chosen], timeout_s, priority, gone)
        except WorkError:
            self.failed += len(chosen)
            return Settled(probabilities, tuple(decisions))
        probabilities = probabilities.copy()
        probabilities[chosen] = answers
        still = set(doubtful_rows(answers, self.policy.below))
        for place, row in enumerate(chosen):
            decisions[row] = "review" if place in still else "fallback"
        return Settled(probabilities, tuple(decisions), tuple(chosen))
