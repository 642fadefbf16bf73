"""A space of configurations: what may be searched, how it is drawn from, and its grid."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from rayloop.config import Config
from rayloop.errors import ConfigError

Assignment = dict[str, Any]
"""Values by field, e.g. `{"train.learning_rate": 0.01}`; conditional fields where they hold."""

MAX_GRID = 100_000


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        is_log: Even in the logarithm and not in the value.
        is_integer: Whole numbers only.
        points: How many of them a grid takes; 0 where it was not said.
    """

    low: float
    high: float
    is_log: bool
    is_integer: bool
    points: int = 0

    def at(self, share: float) -> float | int:
        """The value at a share (0..1) of the way from low to high."""
        if self.is_log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_integer else value

    def share_of(self, value: float) -> float:
        """The inverse of `at`."""
        if self.high == self.low:
            return 0.0
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def __str__(self) -> str:
        points = f", {self.points}" if self.points else ""
        return f"{'log' if self.is_log else 'linear'}({self.low:g}, {self.high:g}{points})"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values, in no order."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"choice({', '.join(str(value) for value in self.values)})"


@dataclass(frozen=True, slots=True)
class Condition:
    """The dimension matters only where a field has one of these values."""

    field: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.field} == {self.values[0]}"
        return f"{self.field} in ({', '.join(str(value) for value in self.values)})"


@dataclass(frozen=True, slots=True)
class Dimension:
    """One field, what it may be, and when it matters."""

    field: str
    domain: Range | Choice
    condition: Condition | None = None

    def __str__(self) -> str:
        return f"{self.field}={self.domain}" + (f" if {self.condition}" if self.condition else "")


@dataclass(frozen=True, slots=True)
class Space:
    """Dimensions, each after the one its condition looks at.

    Attributes:
        dimensions: In the order in which they are drawn.
        base: Settings of all fields that are not searched, which conditions may look at too.
    """

    dimensions: tuple[Dimension, ...]
    base: Config

    def is_active(self, dimension: Dimension, assignment: Mapping[str, Any]) -> bool:
        """Whether a dimension matters, given those before it."""
        condition = dimension.condition
        if condition is None:
            return True
        if condition.field in assignment:
            return assignment[condition.field] in condition.values
        is_searched = any(other.field == condition.field for other in self.dimensions)
        return not is_searched and value_of(self.base, condition.field) in condition.values

    def sample(self, random: np.random.Generator) -> Assignment:
        """Draw each dimension that matters, by itself and evenly."""
        assignment: Assignment = {}
        for dimension in self.dimensions:
            drawn = draw(dimension.domain, random)  # always, so that one draw moves no other
            if self.is_active(dimension, assignment):
                assignment[dimension.field] = drawn
        return assignment

    def matter(self, assignment: Mapping[str, Any]) -> Assignment:
        """The fields of an assignment that matter, given the others."""
        kept: Assignment = {}
        for dimension in self.dimensions:
            if dimension.field in assignment and self.is_active(dimension, kept):
                kept[dimension.field] = assignment[dimension.field]
        return kept

    def grid(self) -> list[Assignment]:
        """Every combination, in the order of the declaration.

        Raises:
            ConfigError: A range does not say how many points, or there are too many combinations.
        """
        return _grid_of(self)

    def combinations(
        self, left: Sequence[Dimension], assignment: Assignment
    ) -> Iterator[Assignment]:
        """Every way to complete an assignment by the dimensions that are left."""
        if not left:
            yield assignment
            return
        dimension, *rest = left
        if not self.is_active(dimension, assignment):
            yield from self.combinations(rest, assignment)
            return
        for value in _grid_values(dimension):
            yield from self.combinations(rest, {**assignment, dimension.field: value})

    def lines(self) -> list[str]:
        """The space as it is printed before a sweep, one aligned line a dimension."""
        width = max(len(dimension.field) for dimension in self.dimensions)
        return [
            f"{dimension.field:<{width}}  {dimension.domain}"
            + (f"  if {dimension.condition}" if dimension.condition else "")
            for dimension in self.dimensions
        ]


def assign(config: Config, assignment: Mapping[str, Any]) -> Config:
    """The configuration with some fields set.

    Raises:
        ConfigError: The values contradict each other or another setting.
    """
    changes: dict[str, Any] = {}
    for field, value in assignment.items():
        place = changes
        *sections, name = field.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return _replaced(config, changes)  # type: ignore[no-any-return]


def value_of(config: Config, field: str) -> Any:
    """The value of a dotted field."""
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def draw(domain: Range | Choice, random: np.random.Generator) -> Any:
    """One value, all equally likely."""
    share = float(random.random())
    if isinstance(domain, Choice):
        return domain.values[min(int(share * len(domain.values)), len(domain.values) - 1)]
    if domain.is_integer and not domain.is_log:
        return int(domain.low + share * (domain.high - domain.low + 1))
    return domain.at(share)


def _replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    values = {
        name: _replaced(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(config, **values)


def _grid_values(dimension: Dimension) -> list[Any]:
    domain = dimension.domain
    if isinstance(domain, Choice):
        return list(domain.values)
    if not domain.points:
        raise ConfigError(
            f"tune.search=grid needs the number of points of '{dimension}', as a third number: "
            f"{'log' if domain.is_log else 'linear'}({domain.low:g}, {domain.high:g}, 4)."
        )
    values = [domain.at(at / (domain.points - 1)) for at in range(domain.points)]
    return list(dict.fromkeys(values))


@cache
def _grid_of(space: Space) -> list[Assignment]:
    """Laid out once: a sweep asks at every trial."""
    found = list(itertools.islice(space.combinations(space.dimensions, {}), MAX_GRID + 1))
    if len(found) > MAX_GRID:
        raise ConfigError(
            f"The grid of tune.space has more than {MAX_GRID:,} combinations; take fewer points or "
            "values, or --tune.search random."
        )
    return found
