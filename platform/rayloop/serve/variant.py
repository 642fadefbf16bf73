"""A model that is loaded under a name, and what a request gets from it."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.batcher import Batcher
from rayloop.serve.events.event import Verdict
from rayloop.serve.protocol.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that is loaded, under a name, with the queue in front of it."""

    name: str
    spec: ModelSpec
    batcher: Batcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one request gets back."""

    prediction_id: str

    variant: Variant
    """What the request was given to."""

    probabilities: NDArray[np.float32]
    """float32 [N, K]."""

    decisions: tuple[Verdict, ...]
    """What to do with each row."""

    second: tuple[int, ...] = ()
    """Rows that the fallback version answered."""

    fallback: str = ""
    """That version; empty where no row fell back."""

    @property
    def version(self) -> str:
        """The version that answered: the fallback's, if all rows fell back."""
        all_fell = len(self.second) == len(self.probabilities)
        return self.fallback if all_fell else self.variant.spec.version

    @property
    def spec(self) -> ModelSpec:
        """What is told about the version that answered."""
        own = self.variant.spec
        return own if self.version == own.version else replace(own, version=self.version)

    @property
    def versions(self) -> tuple[str, ...]:
        """The version that answered each row; empty where the variant's own answered all."""
        if not self.second:
            return ()
        own, rows = self.variant.spec.version, range(len(self.probabilities))
        return tuple(self.fallback if row in self.second else own for row in rows)
