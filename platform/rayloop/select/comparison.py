"""Candidates and the decision among them -> a record and a picture under RAYLOOP_HOME/select."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayloop.clock import Clock, iso_utc
from rayloop.config import Config, SelectConfig, digest_of, to_dict
from rayloop.errors import WorkError
from rayloop.quantize.result import QuantizeResult
from rayloop.select.candidate import Candidate, front_of
from rayloop.select.choice import Chosen, Decision, choose
from rayloop.select.picture import draw_comparison
from rayloop.select.runs import FoundRuns
from rayloop.select.work import SPLIT, Timings, candidates_of
from rayloop.storage import Storage

PICTURE_FILE = "select.png"
RECORD_FILE = "select.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What was compared, and what was decided.

    Attributes:
        dataset: Name and version, as `digits:1f2e`.
        dataset_digest: Its digest.
        rows: Validation rows that every accuracy is over.
        candidates: All models, the fastest first.
        decision: Which one is to be registered, or why none is.
        config: The select section.
        floor: Accuracy of a linear model on the same rows; None where it was left out.
        floor_digest: Digest of what decides the floor.
        left_out: Why a run was not compared, by its name.
        num_threads: Threads while timing.
        cpu_features: Architecture and INT8 instruction sets of the machine.
        created_at: ISO 8601, UTC.
    """

    dataset: str
    dataset_digest: str
    rows: int
    candidates: tuple[Candidate, ...]
    decision: Decision
    config: SelectConfig
    floor: float | None
    floor_digest: str
    left_out: dict[str, str]
    num_threads: int
    cpu_features: tuple[str, ...]
    created_at: str

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that is to be registered, if there is one."""
        return self.decision.candidate if isinstance(self.decision, Chosen) else None

    @property
    def front(self) -> list[Candidate]:
        """Of those that can be registered, the ones that no other one beats in all figures."""
        return front_of([candidate for candidate in self.candidates if not candidate.refused])

    @property
    def constraints(self) -> dict[str, Any]:
        """The limits, None where there is none, and what decides within them."""
        names = ("max_latency_ms", "min_accuracy", "max_bytes")
        limits = {name: getattr(self.config, name) or None for name in names}
        return {**limits, "prefer": self.config.prefer}

    def choice(self, where: str) -> Candidate:
        """The candidate that is to be registered.

        Args:
            where: Where record and picture are, for the message.

        Raises:
            WorkError: There is none; says how far the nearest ones are.
        """
        if isinstance(self.decision, Chosen):
            return self.decision.candidate
        raise WorkError(f"{self.decision.why} The comparison is in {where}.")

    def summary(self) -> dict[str, Any]:
        """What the job's last line says of the comparison."""
        chosen = self.chosen
        return {
            "chosen": chosen.summary() if chosen else None,
            "why": self.decision.why,
            "front": [candidate.summary() for candidate in self.front],
            "candidates": len(self.candidates),
            "constraints": self.constraints,
            "val_rows": self.rows,
            "val_floor": self.floor,
            "left_out": self.left_out,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        front = {candidate.name for candidate in self.front}
        chosen = self.chosen
        rows = [
            {
                **{k: v for k, v in asdict(candidate).items() if k != "right"},
                "on_front": candidate.name in front,
            }
            for candidate in self.candidates
        ]
        return {
            "dataset": self.dataset,
            "dataset_digest": self.dataset_digest,
            "split": "val",
            "rows": self.rows,
            "constraints": self.constraints,
            "chosen": chosen.name if chosen else None,
            "why": self.decision.why,
            "floor": self.floor,
            "floor_digest": self.floor_digest,
            "candidates": rows,
            "left_out": self.left_out,
            "num_threads": self.num_threads,
            "cpu_features": list(self.cpu_features),
            "created_at": self.created_at,
        }


def conclude(
    storage: Storage,
    config: Config,
    found: FoundRuns,
    made: Sequence[QuantizeResult],
    timings: Timings,
    floor: float | None,
    clock: Clock,
) -> Comparison:
    """Decide among what was made and timed.

    Args:
        storage: The root.
        config: All settings; the select section decides.
        found: What was in question.
        made: What was made of each run, at least one.
        timings: As `time_candidates` returns them.
        floor: Accuracy of a linear model on the validation split.
        clock: Stamps the record.
    """
    candidates = candidates_of(storage, made, timings)
    return Comparison(
        dataset=f"{found.dataset.name}:{found.dataset.version}",
        dataset_digest=found.dataset.digest,
        rows=found.dataset.splits[SPLIT],
        candidates=tuple(sorted(candidates, key=lambda c: (c.latency_ms_b1, c.name))),
        decision=choose(candidates, config.select),
        config=config.select,
        floor=floor,
        floor_digest=digest_of_floor(config, found),
        left_out=found.left_out,
        num_threads=config.quantize.num_threads,
        cpu_features=made[0].cpu_features,
        created_at=iso_utc(clock.now()),
    )


def digest_of_floor(config: Config, found: FoundRuns) -> str:
    """Digest of what decides the linear floor: the train section and the data."""
    return digest_of([to_dict(config.train), found.dataset.digest])


def known_floor(storage: Storage, config: Config, found: FoundRuns) -> float | None:
    """The floor that an earlier comparison under the same name found, if it would be the same."""
    path = f"{comparison_folder(config, found)}/{RECORD_FILE}"
    record = storage.read_json(path) if storage.exists(path) else {}
    same = record.get("floor_digest") == digest_of_floor(config, found)
    return record.get("floor") if same else None


def comparison_folder(config: Config, found: FoundRuns) -> str:
    """Where a comparison's files lie, relative to the storage root."""
    dataset = found.dataset
    name = config.select.output or config.select.sweep or f"{dataset.name}-{dataset.version}"
    return f"select/{name}"


def save_comparison(storage: Storage, folder: str, comparison: Comparison) -> None:
    """Write the record and the picture, each in one step."""
    storage.write_json(f"{folder}/{RECORD_FILE}", comparison.to_json())
    storage.write(
        f"{folder}/{PICTURE_FILE}",
        draw_comparison(
            comparison.candidates,
            comparison.front,
            comparison.chosen,
            comparison.config,
            comparison.floor,
            title=f"{comparison.dataset}, {comparison.rows:,} validation rows",
            why=comparison.decision.why,
        ),
    )
