"""A finished run -> its models on disk, compared on the validation split; models -> their times.

The test split stays untouched here: it is for the one model that is chosen. A run's models are
made once for a machine and kept in runs/RUN_ID/candidate; times are taken of all models together,
since only what was measured in the same minutes can be compared.
"""

import hashlib
import importlib.metadata
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rayloop.clock import Clock
from rayloop.config import QuantizeConfig, to_dict
from rayloop.errors import Corrupt, RayloopError, WorkError
from rayloop.quantize.compare import measure_latency
from rayloop.quantize.methods import FP32, INT8_STATIC
from rayloop.quantize.result import (
    LatencyPoint,
    MethodRow,
    QuantizeResult,
    load_quantize_result,
    quantize_folder,
)
from rayloop.quantize.session import Images, open_session
from rayloop.quantize.work import PACKAGES, quantize_run
from rayloop.select.candidate import Candidate
from rayloop.storage import Storage
from rayloop.train.result import TrainResult

CANDIDATE_FOLDER = "candidate"
SPLIT = "val"
METHODS = {FP32: "fp32", INT8_STATIC: "int8"}
"""Compared methods, by the word that stands for them in a candidate's name."""
BATCH_SIZES = (1, 32)
PASSES = 5
"""How often all models are timed, each time for a part of the configured seconds."""
FP32_IS_COMPARED = "fp32 is compared only; INT8 is what is registered"

Timings = dict[str, tuple[LatencyPoint, ...]]


def candidate_settings(config: QuantizeConfig) -> QuantizeConfig:
    """The quantize section for candidates: their times are taken later, so here only roughly."""
    return replace(config, batch_sizes=BATCH_SIZES, seconds_per_point=0.01)


def find_made(
    storage: Storage,
    trained: TrainResult,
    settings: QuantizeConfig,
    features: tuple[str, ...],
    split: str = SPLIT,
    folder_name: str = CANDIDATE_FOLDER,
) -> QuantizeResult | None:
    """What was made of a run before; None unless it is what would be made now.

    Args:
        storage: The root.
        trained: The run.
        settings: The quantize section it must have been made with.
        features: The machine it must have been made on, as `cpu_features` returns them.
        split: What it must have been compared on.
        folder_name: Where to look, inside the run's folder.
    """
    try:
        made = load_quantize_result(storage, trained.run_id, folder_name)
        folder = quantize_folder(trained.run_id, folder_name)
        whole = all(
            hashlib.sha256(storage.read(f"{folder}/{row.file}")).hexdigest() == row.sha256
            for row in made.methods
        )
    except RayloopError:
        return None
    is_current = (
        (made.checkpoint_digest, made.dataset_digest)
        == (trained.checkpoint_digest, trained.dataset_digest)
        and made.config == to_dict(settings)
        and made.cpu_features == features
        and made.packages == {name: importlib.metadata.version(name) for name in PACKAGES}
        and made.split == split
    )
    return made if whole and is_current else None


def make_candidate(
    storage: Storage, run_id: str, settings: QuantizeConfig, clock: Clock
) -> QuantizeResult:
    """Export and quantize a run's model and compare it on the validation split.

    Raises:
        RayloopError: As `rayloop.quantize.work.quantize_run`.
    """
    for item in quantize_run(storage, settings, run_id, clock, SPLIT, CANDIDATE_FOLDER):
        if isinstance(item, QuantizeResult):
            return item
    raise WorkError(f"Quantizing run {run_id} ended without a result; run it again.")


def time_candidates(
    storage: Storage,
    made: Sequence[QuantizeResult],
    images: Images,
    config: QuantizeConfig,
    clock: Clock,
) -> Timings:
    """Time all models in turns in this process, several times over.

    A busy moment hits several models, and a model that it hit is timed again in a later pass: each
    keeps its quietest pass, since what else the machine does says nothing about a model.

    Args:
        storage: The root.
        made: What was made of each run.
        images: uint8 rows to take batches from, shape (N, H, W, C).
        config: Threads, and seconds for each model at each batch size.
        clock: Read before and after every call.

    Returns:
        The timing at each of `BATCH_SIZES` by candidate name.

    Raises:
        Corrupt: A model's file is not the one that was compared.
    """
    sessions = {
        name_of(result, row): open_session(_content(storage, result, row), config.num_threads)
        for result in made
        for row in compared(result)
    }
    seconds = config.seconds_per_point / PASSES
    passes = {
        size: [measure_latency(sessions, images, size, seconds, clock) for _ in range(PASSES)]
        for size in BATCH_SIZES
    }
    return {
        name: tuple(_quietest([each[name] for each in passes[size]]) for size in BATCH_SIZES)
        for name in sessions
    }


def _quietest(points: Sequence[LatencyPoint]) -> LatencyPoint:
    """The fastest pass, with the spread of all of them."""
    best = min(points, key=lambda point: point.median_ms)
    slowest = max(point.median_ms for point in points)
    return replace(best, spread=(slowest - best.median_ms) / best.median_ms)


def candidates_of(
    storage: Storage, made: Sequence[QuantizeResult], timings: Timings
) -> list[Candidate]:
    """What was found out about every model, in one list."""
    return [
        _candidate(storage, result, row, timings[name_of(result, row)])
        for result in made
        for row in compared(result)
    ]


def name_of(result: QuantizeResult, row: MethodRow) -> str:
    """A candidate's name."""
    return f"{result.run_id}/{METHODS[row.name]}"


def compared(result: QuantizeResult) -> list[MethodRow]:
    """The methods of a run that become candidates."""
    return [row for row in result.methods if row.name in METHODS]


def _candidate(
    storage: Storage, result: QuantizeResult, row: MethodRow, points: tuple[LatencyPoint, ...]
) -> Candidate:
    one, many = points
    is_int8 = row.name == INT8_STATIC
    refused = ("" if result.passed else result.gate) if is_int8 else FP32_IS_COMPARED
    return Candidate(
        name=name_of(result, row),
        run_id=result.run_id,
        method=row.name,
        accuracy=row.accuracy,
        agreement=row.agreement,
        latency_ms_b1=one.median_ms,
        latency_ms_p99=one.p99_ms,
        images_per_second=many.images_per_second,
        spread=max(one.spread, many.spread),
        size_bytes=row.size_bytes,
        refused=refused,
        **({} if refused else {"right": _right_rows(storage, result)}),
    )


def _right_rows(storage: Storage, result: QuantizeResult) -> npt.NDArray[np.bool_]:
    folder = quantize_folder(result.run_id, CANDIDATE_FOLDER)
    with np.load(io.BytesIO(storage.read(f"{folder}/predictions.npz"))) as arrays:
        order = np.argsort(arrays["row_ids"])
        right: npt.NDArray[np.bool_] = (arrays["class_index"] == arrays["labels"])[order]
    return right


def _content(storage: Storage, result: QuantizeResult, row: MethodRow) -> bytes:
    path = f"{quantize_folder(result.run_id, CANDIDATE_FOLDER)}/{row.file}"
    content = storage.read(path)
    if hashlib.sha256(content).hexdigest() != row.sha256:
        raise Corrupt(
            f"{storage.path(path)} was changed after it was compared; compare again with "
            "--remeasure."
        )
    return content
