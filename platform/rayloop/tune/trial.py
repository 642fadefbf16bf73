"""What is known of a sweep's trials, as records on disk that one process writes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rayloop.errors import Corrupt
from rayloop.storage import Storage
from rayloop.train.loop import Record
from rayloop.tune.space import Assignment

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One configuration that is tried.

    Attributes:
        number: From 0 on, in the order of the suggestions.
        run_id: Its training run.
        assignment: What was searched, by field.
        parent: Number of the trial whose model it goes on with; -1 begins anew.
        start_epoch: Epochs that were done before it.
        stop_epochs: Epochs after which it ends; 0 is the configured end.
        status: `running` until it ends; `stopped` is ended early by the sweep's own decision.
        records: One an epoch, in order.
        costs: Figures of the network that no training changes.
        attempts: How often it was begun.
        error: Why it failed.
        seconds: Wall time from its first begin to its end, in the session that ended it.
    """

    number: int
    run_id: str
    assignment: Assignment
    parent: int = -1
    start_epoch: float = 0.0
    stop_epochs: float = 0.0
    status: Status = "running"
    records: tuple[Record, ...] = ()
    costs: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    error: str = ""
    seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return self.status != "running"

    @property
    def epochs(self) -> float:
        """Epochs that were trained for it."""
        return self.records[-1]["epoch"] - self.start_epoch if self.records else 0.0

    @property
    def figures(self) -> dict[str, float]:
        """All that its last record and its costs say."""
        return {**self.costs, **(self.records[-1] if self.records else {})}

    def add(self, record: Record) -> "Trial":
        """With one more record; one that is known already, after a restart, changes nothing."""
        known = self.records[-1]["step"] if self.records else -1
        if record["step"] <= known or record["epoch"] <= self.start_epoch:
            return self
        return replace(self, records=(*self.records, record))


def trials_folder(sweep_id: str) -> str:
    """Where a sweep's trials are recorded, relative to the storage root."""
    return f"runs/{sweep_id}/trials"


def save_trial(storage: Storage, sweep_id: str, trial: Trial) -> None:
    """Write a trial's record in one step."""
    storage.write_json(f"{trials_folder(sweep_id)}/{trial.number:04d}.json", asdict(trial))


def load_trials(storage: Storage, sweep_id: str) -> list[Trial]:
    """All trials of a sweep in order.

    Raises:
        Corrupt: A record is damaged.
    """
    folder = trials_folder(sweep_id)
    return [_load(storage, f"{folder}/{name}") for name in storage.names(folder)]


def _load(storage: Storage, path: str) -> Trial:
    fields = storage.read_json(path)
    try:
        assignment = {name: _plain(value) for name, value in fields["assignment"].items()}
        records = tuple(fields["records"])
        return Trial(**{**fields, "assignment": assignment, "records": records})
    except (KeyError, TypeError) as error:
        raise Corrupt(
            f"{storage.path(path)} is not a trial this rayloop can read ({error}); remove it, and "
            "its run's folder, to try it again."
        ) from None


def _plain(value: Any) -> Any:
    """JSON knows no tuples, and configurations no lists."""
    return tuple(_plain(element) for element in value) if isinstance(value, list) else value


def lineage(trials: Sequence[Trial], trial: Trial) -> list[Trial]:
    """A trial after all those whose models it goes on with, the first one first."""
    line = [trial]
    while line[0].parent >= 0:
        line.insert(0, trials[line[0].parent])
    return line
