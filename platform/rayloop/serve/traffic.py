"""Turn who a request is for into the variant that answers it, the same one every time."""

import hashlib
import math
from dataclasses import dataclass
from itertools import accumulate

from rayloop.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficPlan:
    """Which variants answer, and for which share of the units.

    Assignment is by a hash of salt and unit, so it is the same in every replica and after every
    restart. Shares are laid out in order; growing a neighbour's share moves only the difference.
    """

    variants: tuple[tuple[str, float], ...]
    """Pairs of variant name and share (0..1); the shares sum to 1."""

    salt: str = "rayloop"
    """Makes assignments of two experiments independent."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.variants]
        shares = [share for _, share in self.variants]
        if not names or len(set(names)) != len(names) or not all(names):
            raise ConfigError(
                f"Traffic variants {names} must be one or more different, non-empty names."
            )
        if not all(0.0 <= share <= 1.0 for share in shares) or not math.isclose(sum(shares), 1.0):
            raise ConfigError(f"Traffic shares {shares} must be from 0 to 1 and sum to 1.")

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names in order."""
        return tuple(name for name, _ in self.variants)

    def assign(self, unit: str) -> str:
        """The variant for a unit.

        Args:
            unit: Who the request is for, e.g. a user id; a request id when nobody is named.
        """
        if len(self.variants) == 1:
            return self.variants[0][0]
        hashed = hashlib.sha256(f"{self.salt}\0{unit}".encode()).digest()
        point = int.from_bytes(hashed[:8], "big") / 2**64
        ends = accumulate(share for _, share in self.variants)
        for (name, share), end in zip(self.variants, ends, strict=True):
            if share > 0 and point < end:
                return name
        return next(name for name, share in reversed(self.variants) if share > 0)


def single(variant: str) -> TrafficPlan:
    """The plan in which one variant answers everything."""
    return TrafficPlan(variants=((variant, 1.0),))
