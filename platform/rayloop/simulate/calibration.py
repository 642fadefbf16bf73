"""What was measured of one machine and one model: the numbers every prediction starts from.

A calibration is a JSON file of the fields below. `benchmarks/simulator.py` measures one;
`rayloop.simulate.recorded` reads one out of a finished run's own record.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from rayloop.errors import ConfigError, Corrupt
from rayloop.simulate.network import Link
from rayloop.storage import Storage

POSITIVE = ("row_s", "rows_per_worker", "largest_rows", "workers", "exchange_bytes", "run_rows",
            "cores")  # fmt: skip
NOT_NEGATIVE = (
    "fixed_s", "noise", "least_rows", "platform_cores", "node_latency_s", "crowded_latency_s",
    "hidden_share", "checkpoint_s", "checkpoint_bytes", "start_s", "restart_s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """One machine and one model, measured.

    Attributes:
        name: Of machine and model.
        source: How, when and where it was measured.
        fixed_s: Seconds of a step that do not depend on its rows: the update, the bookkeeping.
        row_s: Seconds for each row of a worker, one worker alone on the machine.
        rows_per_worker: Rows of a worker in a step of the calibrated configuration.
        least_rows: Fewest rows of a worker with which it was measured.
        largest_rows: Most rows of a worker with which it was measured.
        noise: Standard deviation of a node's step time from one step to the next, over its mean.
        cores: Of a node.
        contention: Pairs of workers on one node and how many times longer a step takes with them
            beside each other and in step, without any exchange; rising from (1, 1.0).
        platform_cores: Cores of a node that Ray's own processes keep busy while a run trains. Where
            workers fill the node, whoever is interrupted is waited for by all of them.
        exchange_bytes: What a step sums over the workers.
        node_latency_s: Of a message between two workers of a node.
        crowded_latency_s: The same where a node has more workers than cores, and who gets a
            message waits for a core as well.
        node_bytes_per_s: Between two workers of a node.
        hidden_share: Share (0..1) of a step's computation under which the exchange may hide: 0
            where it waits for the whole gradient, as with `train.worker_invariant`; about 2/3, the
            backward pass, with DDP.
        checkpoint_s: Time a checkpoint takes from the training.
        checkpoint_bytes: Its size.
        start_s: From the start of a run to its first step.
        restart_s: From a worker's failure to the next new step.
        workers: Most workers with which anything was measured.
        run_rows: Rows the calibrated run is trained on, all epochs together.
    """

    name: str
    source: str
    fixed_s: float
    row_s: float
    rows_per_worker: float
    least_rows: float
    largest_rows: float
    noise: float
    cores: int
    contention: tuple[tuple[int, float], ...]
    platform_cores: float
    exchange_bytes: float
    node_latency_s: float
    crowded_latency_s: float
    node_bytes_per_s: float
    hidden_share: float
    checkpoint_s: float
    checkpoint_bytes: float
    start_s: float
    restart_s: float
    workers: int
    run_rows: float

    def __post_init__(self) -> None:
        for name in POSITIVE:
            self._require(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        self._require("node_bytes_per_s", self.node_bytes_per_s > 0, "a number above 0")
        for name in NOT_NEGATIVE:
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 on")
        self._require("hidden_share", self.hidden_share <= 1, "a share from 0 to 1")
        counts = [count for count, _ in self.contention]
        factors = [factor for _, factor in self.contention]
        rises = counts == sorted(set(counts)) and factors == sorted(factors)
        self._require(
            "contention",
            rises and self.contention[:1] == ((1, 1.0),) and factors[-1] < math.inf,
            "rising pairs [workers, factor] that begin with [1, 1.0]",
        )

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(
                f"{name}={getattr(self, name)} of the calibration {self.name!r} must be {wanted}. "
                "Measure it again: python benchmarks/simulator.py"
            )

    def inside(self, on_node: int) -> Link:
        """What connects two workers of a node with so many of them."""
        is_crowded = on_node > self.cores
        latency_s = self.crowded_latency_s if is_crowded else self.node_latency_s
        return Link(latency_s=latency_s, bytes_per_s=self.node_bytes_per_s)

    def slowdown(self, on_node: int) -> float:
        """How many times longer a step takes with so many workers, and Ray, on a node."""
        interrupted = self.platform_cores if on_node >= self.cores else 0.0
        return self.crowding(on_node) * (1 + interrupted)

    def crowding(self, on_node: int) -> float:
        """How many times longer a step takes with so many workers on a node.

        Between two measured numbers it is interpolated; beyond the last one it stays while there
        are cores, and then grows as the number of workers.
        """
        if on_node in (counts := dict(self.contention)):
            return counts[on_node]
        most, factor = self.contention[-1]
        if on_node > most:
            return factor * max(on_node, self.cores) / max(most, self.cores)
        (low, at_low), (high, at_high) = next(
            pair
            for pair in zip(self.contention, self.contention[1:], strict=False)
            if pair[0][0] < on_node < pair[1][0]
        )
        return at_low + (at_high - at_low) * (on_node - low) / (high - low)


def save_calibration(calibration: Calibration, storage: Storage, path: str) -> None:
    """Write a calibration as JSON."""
    storage.write_json(path, asdict(calibration))


def load_calibration(storage: Storage, path: str) -> Calibration:
    """Read a calibration.

    Args:
        storage: Where it lies.
        path: Its file, relative to the root.

    Raises:
        DataMissing: There is no such file.
        Corrupt: It is no JSON, or a field is missing, unknown or of the wrong kind.
        ConfigError: A number is out of its range.
    """
    values = storage.read_json(path)
    where = storage.path(path)
    names = {field.name: field.type for field in fields(Calibration)}
    missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
    if missing or unknown:
        raise _unreadable(
            where,
            "; ".join(
                f"{what} {', '.join(those)}"
                for what, those in (("it lacks", missing), ("unknown are", unknown))
                if those
            ),
        )
    for name, kind in names.items():
        if name != "contention":
            values[name] = _of_kind(values[name], kind, name, where)
    return Calibration(**values | {"contention": _pairs(values["contention"], where)})


def _of_kind(value: Any, kind: Any, name: str, where: str) -> Any:
    if kind is str:
        is_right = isinstance(value, str)
    else:
        is_right = isinstance(value, int | float) and not isinstance(value, bool)
        is_right = is_right and (kind is float or value == int(value))
    if not is_right:
        raise _unreadable(where, f"{name}={value!r} is no {kind.__name__}")
    return kind(value)


def _pairs(value: Any, where: str) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(count), float(factor)) for count, factor in value)
    except (TypeError, ValueError):
        raise _unreadable(where, f"contention={value!r} is no list of [workers, factor]") from None


def _unreadable(where: str, why: str) -> Corrupt:
    return Corrupt(
        f"{where} is no calibration this rayloop can read: {why}. Measure a new one: "
        "python benchmarks/simulator.py"
    )
