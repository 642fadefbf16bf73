"""What quantization leaves behind: the compared methods, the gate's answer, the evidence."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from rayloop.errors import Corrupt, DataMissing
from rayloop.storage import Storage

QUANTIZE_FOLDER = "quantize"
"""Where the files lie that may be registered, inside a run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyPoint:
    """Timing of one method at one batch size.

    Attributes:
        batch_size: Rows of one call.
        calls: Calls that were timed.
        median_ms: Median time of a call in milliseconds.
        p99_ms: 99th percentile of the same.
        spread: Difference between the slowest and the fastest round's median, as a share of the
            median; what the machine's other work did to the figure.
        images_per_second: Rows a second at the median.
    """

    batch_size: int
    calls: int
    median_ms: float
    p99_ms: float
    spread: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow:
    """One method compared with fp32 on the whole test split.

    Attributes:
        name: `fp32`, `int8_static` or `int8_dynamic`.
        file: File name beside result.json.
        sha256: Digest of the file's bytes.
        size_bytes: The file's size.
        accuracy: Share (0..1) of rows whose likeliest class is the label.
        agreement: Share (0..1) of rows on which it chooses fp32's class.
        max_probability_change: Largest difference (0..1) of any probability from fp32's.
        mean_total_variation: Mean distance (0..1) from fp32's probabilities.
        class_accuracy: Accuracy by class name; classes without test rows are left out.
        worst_class_drop: Largest loss of accuracy (0..1) of any class against fp32.
        batch_difference: Largest change of a row's probability (0..1) between being asked alone and
            in a batch; 0 is bit for bit.
        latency: Timings by batch size.
        excluded_layers: Layers left in fp32.
    """

    name: str
    file: str
    sha256: str
    size_bytes: int
    accuracy: float
    agreement: float
    max_probability_change: float
    mean_total_variation: float
    class_accuracy: dict[str, float]
    worst_class_drop: float
    batch_difference: float
    latency: tuple[LatencyPoint, ...]
    excluded_layers: tuple[str, ...] = ()

    def at_batch(self, batch_size: int) -> LatencyPoint:
        """The timing at one batch size.

        Raises:
            DataMissing: It was not measured.
        """
        for point in self.latency:
            if point.batch_size == batch_size:
                return point
        raise DataMissing(
            f"Method {self.name} was not measured at batch size {batch_size}; add it to "
            "--quantize.batch_sizes and quantize again."
        )

    def summary(self) -> dict[str, Any]:
        """The row as a job prints it."""
        return {
            "name": self.name,
            "accuracy": self.accuracy,
            "size_bytes": self.size_bytes,
            "latency_ms_b1": self.at_batch(1).median_ms,
            "images_per_second_b32": self.at_batch(32).images_per_second,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A test row the chosen model gets wrong.

    Attributes:
        row_id: Its row in the test split.
        label: The true class index.
        predicted: The chosen class index.
        confidence: Probability (0..1) of the chosen class.
    """

    row_id: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeResult:
    """Everything `jobs/quantize.py` found out about one run.

    Attributes:
        run_id: The run whose checkpoint was quantized.
        model_name: The network's name.
        checkpoint_digest: Digest of the weights this began with.
        dataset_name: Dataset of calibration and test rows.
        dataset_version: Its version.
        dataset_digest: Its digest.
        class_names: Label names in index order.
        shape: Height, width, channels.
        test_rows: Rows every accuracy is over, those of `split`.
        calibration_rows: Training rows that set the ranges.
        methods: The compared methods, fp32 first.
        chosen: Name of the method that passed the gate, or empty.
        gate: `pass`, or the reasons for refusing, joined.
        attempts: What the gate said to each static INT8 model, by number of excluded layers.
        sensitivity: Error of each layer when quantized alone, worst first; empty when no layer
            had to be excluded.
        size_ratio: Bytes of the chosen (else the last static) model over those of fp32.
        speedup_b1: How many times faster than fp32 it answers one row.
        speedup_b32: The same for 32 rows.
        overhead_bytes: Bytes of its file that are not constants.
        confusion: Rows by true class (row) and predicted class (column).
        mistakes: The most confident wrong answers.
        num_threads: Threads while timing.
        cpu_features: Architecture and INT8 instruction sets of the machine.
        reduce_range: Whether the weights have 7 bits.
        packages: Versions of what made the files.
        config: The quantize section.
        created_at: ISO 8601, UTC.
        seconds: Wall time of the whole work.
        split: What was compared on: `test`, or `val` where models are compared to choose one.
    """

    run_id: str
    model_name: str
    checkpoint_digest: str
    dataset_name: str
    dataset_version: str
    dataset_digest: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    test_rows: int
    calibration_rows: int
    methods: tuple[MethodRow, ...]
    chosen: str
    gate: str
    attempts: tuple[dict[str, Any], ...]
    sensitivity: tuple[dict[str, Any], ...]
    size_ratio: float
    speedup_b1: float
    speedup_b32: float
    overhead_bytes: int
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]
    num_threads: int
    cpu_features: tuple[str, ...]
    reduce_range: bool
    packages: dict[str, str]
    config: dict[str, Any]
    created_at: str
    seconds: float
    split: str = "test"

    @property
    def passed(self) -> bool:
        """Whether a method passed the gate."""
        return self.gate == "pass" and bool(self.chosen)

    def method(self, name: str) -> MethodRow:
        """The row of one method.

        Raises:
            DataMissing: It was not compared.
        """
        for row in self.methods:
            if row.name == name:
                return row
        raise DataMissing(
            f"Run {self.run_id} compared {', '.join(row.name for row in self.methods)}, "
            f"not {name!r}."
        )

    def summary(self) -> dict[str, Any]:
        """The last line of jobs/quantize.py."""
        return {
            "run_id": self.run_id,
            "methods": [row.summary() for row in self.methods],
            "chosen": self.chosen,
            "gate": self.gate,
            "size_ratio": self.size_ratio,
            "speedup_b1": self.speedup_b1,
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "QuantizeResult":
        """The inverse of `to_json`."""
        plain = dict(fields)
        plain["methods"] = tuple(_row(row) for row in fields["methods"])
        plain["mistakes"] = tuple(Mistake(**entry) for entry in fields["mistakes"])
        plain["confusion"] = tuple(tuple(row) for row in fields["confusion"])
        for name in ("class_names", "shape", "attempts", "sensitivity", "cpu_features"):
            plain[name] = tuple(fields[name])
        return cls(**plain)


def _row(fields: dict[str, Any]) -> MethodRow:
    points = tuple(LatencyPoint(**point) for point in fields["latency"])
    excluded = tuple(fields["excluded_layers"])
    return MethodRow(**{**fields, "latency": points, "excluded_layers": excluded})


def quantize_folder(run_id: str, name: str = QUANTIZE_FOLDER) -> str:
    """Where a run's quantized files lie, relative to the storage root."""
    return f"runs/{run_id}/{name}"


def load_quantize_result(
    storage: Storage, run_id: str, folder_name: str = QUANTIZE_FOLDER
) -> QuantizeResult:
    """Read what quantization wrote for a run.

    Args:
        storage: The root.
        run_id: The run.
        folder_name: Where the files lie, inside the run's folder.

    Raises:
        DataMissing: The run was not quantized.
        Corrupt: The file is damaged.
    """
    path = f"{quantize_folder(run_id, folder_name)}/result.json"
    if not storage.exists(path):
        raise DataMissing(
            f"Run {run_id!r} has no {storage.path(path)}: it is not quantized yet. "
            f"Run: python jobs/quantize.py PRESET --run-id {run_id}"
        )
    try:
        return QuantizeResult.from_json(storage.read_json(path))
    except (KeyError, TypeError) as error:
        raise Corrupt(
            f"{storage.path(path)} is not a result this rayloop can read ({error}). "
            f"Run again: python jobs/quantize.py PRESET --run-id {run_id}"
        ) from None
