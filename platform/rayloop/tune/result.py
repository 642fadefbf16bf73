"""What a sweep leaves behind for the stages after it, as one record on disk."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rayloop.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneResult:
    """A finished sweep.

    Attributes:
        run_id: The sweep's name.
        best_run_id: The winner's training run.
        best_config: What was searched, by field, as the winner has it.
        best_score: The winner's first objective.
        objectives: What was searched for.
        test_accuracy: The winner's, on the test split; no other trial has seen it.
        floor_accuracy: The linear model's on the same split; None where it was left out.
        num_trials: Trials in all.
        finished: Those that were trained to their end.
        stopped: Those that were stopped early.
        failed: Those that failed.
        budget_epochs: Epochs trained in all trials.
        schedule: For a population, from which epoch on the winner's model had which settings; empty
            where it had the same from its first epoch.
        front: Run ids that no other finished trial beats in all objectives.
        picture: Where the picture is, relative to the storage root.
        seconds: Wall time of the last session.
    """

    run_id: str
    best_run_id: str
    best_config: dict[str, Any]
    best_score: float
    objectives: tuple[str, ...]
    test_accuracy: float | None
    floor_accuracy: float | None
    num_trials: int
    finished: int
    stopped: int
    failed: int
    budget_epochs: float
    schedule: list[dict[str, Any]] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    picture: str = ""
    seconds: float = 0.0

    def last_line(self) -> dict[str, Any]:
        """What the tune job prints."""
        return asdict(self)


def save_tune_result(storage: Storage, result: TuneResult) -> None:
    """Write `runs/SWEEP/result.json`'s counterpart for a sweep: `tune.json`."""
    storage.write_json(f"runs/{result.run_id}/tune.json", asdict(result))
