"""A trained run -> its files under runs/RUN_ID/quantize, and the record of the comparison."""

import importlib.metadata
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rayloop.clock import Clock, iso_utc
from rayloop.config import QuantizeConfig, to_dict
from rayloop.data.versions import Split, open_version, read_split
from rayloop.errors import WorkError
from rayloop.models.classifier import ImageClassifier
from rayloop.quantize import graph, methods
from rayloop.quantize.compare import (
    accuracy,
    agreement,
    batch_difference,
    compare_method,
    confusion,
    measure_latency,
    worst_mistakes,
)
from rayloop.quantize.cpu import cpu_features, needs_reduced_range
from rayloop.quantize.export import export_onnx
from rayloop.quantize.gate import refusals
from rayloop.quantize.methods import FP32, INT8_DYNAMIC, INT8_STATIC, StaticQuantizer
from rayloop.quantize.result import (
    QUANTIZE_FOLDER,
    MethodRow,
    QuantizeResult,
    quantize_folder,
)
from rayloop.quantize.session import Probabilities, open_session, predict
from rayloop.storage import Storage
from rayloop.train.result import TrainResult, load_model, load_result

GOLDEN_ROWS = 32
SENSITIVITY_ROWS = 256
WORST_MISTAKES = 24
PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the quantization of one run works on.

    Attributes:
        config: The quantize section.
        clock: Times the methods and the work.
        folder: Local folder in which the files are made.
        train_rows: Rows to calibrate on.
        split: Name of the split that is compared on.
        rows: Its rows.
        class_names: Label names in index order.
        features: The machine's, as `cpu_features` returns them.
    """

    config: QuantizeConfig
    clock: Clock
    folder: Path
    train_rows: Split
    split: str
    rows: Split
    class_names: tuple[str, ...]
    features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Where the search for a static INT8 model ended.

    Attributes:
        excluded: Layers left in fp32.
        reasons: Why the gate refuses it; empty when it passes.
        attempts: Figures and reasons of every model tried.
        sensitivity: Layers by the error they cause, when that had to be measured.
    """

    excluded: tuple[str, ...]
    reasons: list[str]
    attempts: tuple[dict[str, Any], ...]
    sensitivity: tuple[methods.LayerError, ...]


def quantize_run(
    storage: Storage,
    config: QuantizeConfig,
    run_id: str,
    clock: Clock,
    split: str = "test",
    folder_name: str = QUANTIZE_FOLDER,
) -> Iterator[str | QuantizeResult]:
    """Export, quantize, compare and judge a run's model, and publish the files in one step.

    Args:
        storage: The root everything lives under.
        config: The quantize section.
        run_id: The run; empty means the newest.
        clock: Times the methods and the work.
        split: What is compared on; the calibration is on training rows whatever it is.
        folder_name: Where the files go, inside the run's folder.

    Yields:
        Lines that say how far the work is, and at last the result.

    Raises:
        DataMissing: There is no such run, or its dataset is gone.
        Corrupt: The checkpoint does not match its digest.
        WorkError: The model cannot be exported.
    """
    began = clock.monotonic()
    trained = load_result(storage, run_id)
    dataset = open_version(storage, trained.dataset_name, trained.dataset_version)
    model = load_model(storage, trained)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            config=config,
            clock=clock,
            folder=Path(folder),
            train_rows=read_split(storage, dataset, "train"),
            split=split,
            rows=read_split(storage, dataset, split),
            class_names=trained.class_names,
            features=cpu_features(),
        )
        result: QuantizeResult | None = None
        for item in quantize_model(job, model, trained):
            if isinstance(item, QuantizeResult):
                result = item
            else:
                yield item
        if result is None:
            raise WorkError(
                f"Quantizing run {trained.run_id} ended without a result; run it again."
            )
        result = replace(result, seconds=clock.monotonic() - began)
        Storage(folder).write_json("result.json", result.to_json())
        storage.publish(job.folder, quantize_folder(trained.run_id, folder_name))
    yield result


def quantize_model(
    job: Job, model: ImageClassifier, trained: TrainResult
) -> Iterator[str | QuantizeResult]:
    """Make and compare the methods in the job's folder.

    Yields:
        Lines that say how far the work is, and at last the result.
    """
    yield f"exporting {trained.model_name} of run {trained.run_id} to ONNX"
    files = {name: job.folder / f"{name}.onnx" for name in (FP32, INT8_STATIC, INT8_DYNAMIC)}
    reduce_range = needs_reduced_range(job.features)
    export_onnx(model, files[FP32])
    methods.write_dynamic(files[FP32], files[INT8_DYNAMIC], reduce_range)
    calibration = methods.calibration_rows(job.train_rows.images, job.config.calibration_rows)
    quantizer = StaticQuantizer(
        fp32=files[FP32],
        rows=calibration,
        reduce_range=reduce_range,
        cache=job.folder / "ranges.json",
    )
    images = job.rows.images
    answers = {name: predict(open_session(files[name]), images) for name in (FP32, INT8_DYNAMIC)}
    yield f"fp32: accuracy {accuracy(answers[FP32], job.rows.labels):.4f}; calibrating INT8"
    chosen = Chosen(excluded=(), reasons=[], attempts=(), sensitivity=())
    for item in search(job, quantizer, files[INT8_STATIC], answers[FP32]):
        if isinstance(item, Chosen):
            chosen = item
        else:
            yield item
    answers[INT8_STATIC] = predict(open_session(files[INT8_STATIC]), images)
    quantizer.cache.unlink(missing_ok=True)
    yield f"measuring latency at batch sizes {', '.join(map(str, job.config.batch_sizes))}"
    rows = compare_methods(job, files, answers, chosen)
    passing = "" if chosen.reasons else INT8_STATIC
    save_arrays(job, answers[INT8_STATIC])
    yield make_result(job, trained, rows, answers[INT8_STATIC], chosen, passing, len(calibration))


def search(
    job: Job, quantizer: StaticQuantizer, target: Path, fp32_answers: Probabilities
) -> Iterator[str | Chosen]:
    """Look for the static INT8 model with the fewest fp32 layers that passes the gate.

    Layers are left out in the order of the error that each causes alone, measured on training
    rows. If none passes, the last model tried is left in `target`.

    Yields:
        Lines that say how far the work is, and at last what was chosen.
    """
    labels, limit = job.rows.labels, job.config.max_excluded_layers
    sensitivity: tuple[methods.LayerError, ...] = ()
    attempts: list[dict[str, Any]] = []
    reasons: list[str] = []
    excluded: tuple[str, ...] = ()
    for count in range(limit + 1):
        if count == 1:
            yield "the gate refuses plain INT8; measuring how much each layer suffers"
            rows = methods.calibration_rows(job.train_rows.images, SENSITIVITY_ROWS)
            sensitivity = methods.rank_layers(quantizer, job.folder, rows)
        if count and count >= len(sensitivity):
            break
        excluded = tuple(entry.layer for entry in sensitivity[:count])
        quantizer.write(target, excluded)
        answers = predict(open_session(target), job.rows.images)
        score, agreed = accuracy(answers, labels), agreement(answers, fp32_answers)
        reasons = refusals(job.config, accuracy(fp32_answers, labels), score, agreed)
        attempts.append(
            {"excluded": list(excluded), "accuracy": score, "agreement": agreed, "reasons": reasons}
        )
        yield f"INT8 with {count} fp32 layers: accuracy {score:.4f}, agreement {agreed:.4f}"
        if not reasons:
            break
    yield Chosen(
        excluded=tuple(attempts[-1]["excluded"]),
        reasons=reasons,
        attempts=tuple(attempts),
        sensitivity=sensitivity,
    )


def compare_methods(
    job: Job, files: dict[str, Path], answers: dict[str, Probabilities], chosen: Chosen
) -> tuple[MethodRow, ...]:
    """Time all methods in turns and put every figure about each into its row."""
    images = job.rows.images
    sessions = {name: open_session(file, job.config.num_threads) for name, file in files.items()}
    points = [
        measure_latency(sessions, images, size, job.config.seconds_per_point, job.clock)
        for size in job.config.batch_sizes
    ]
    return tuple(
        compare_method(
            name,
            file,
            answers[name],
            answers[FP32],
            job.rows.labels,
            job.class_names,
            batch_difference(sessions[name], images),
            tuple(point[name] for point in points),
            chosen.excluded if name == INT8_STATIC else (),
        )
        for name, file in files.items()
    )


def save_arrays(job: Job, answers: Probabilities) -> None:
    """Write the static model's answers.

    `predictions.npz` holds those for all rows of the split, `golden.npz` a few images with their
    answers, by which a server proves that it computes the same.
    """
    rows = job.rows
    np.savez_compressed(
        job.folder / "predictions.npz",
        row_ids=rows.row_ids,
        labels=rows.labels,
        class_index=answers.argmax(axis=1).astype(np.int32),
        confidence=answers.max(axis=1),
        probabilities=answers,
    )
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(GOLDEN_ROWS, len(rows))).astype(np.int64))
    np.savez_compressed(
        job.folder / "golden.npz",
        images=rows.images[chosen],
        labels=rows.labels[chosen],
        row_ids=rows.row_ids[chosen],
        probabilities=answers[chosen],
    )


def make_result(
    job: Job,
    trained: TrainResult,
    rows: tuple[MethodRow, ...],
    answers: Probabilities,
    chosen: Chosen,
    passing: str,
    calibrated: int,
) -> QuantizeResult:
    """The record of a finished comparison; `seconds` is filled in by `quantize_run`."""
    by_name = {row.name: row for row in rows}
    fp32, static = by_name[FP32], by_name[INT8_STATIC]
    labels = job.rows.labels
    constants = graph.weight_bytes(onnx.load(job.folder / static.file))
    return QuantizeResult(
        run_id=trained.run_id,
        model_name=trained.model_name,
        checkpoint_digest=trained.checkpoint_digest,
        dataset_name=trained.dataset_name,
        dataset_version=trained.dataset_version,
        dataset_digest=trained.dataset_digest,
        class_names=job.class_names,
        shape=trained.shape,
        split=job.split,
        test_rows=len(labels),
        calibration_rows=calibrated,
        methods=rows,
        chosen=passing,
        gate="; ".join(chosen.reasons) or "pass",
        attempts=chosen.attempts,
        sensitivity=tuple(
            {"layer": entry.layer, "error": entry.error} for entry in chosen.sensitivity
        ),
        size_ratio=static.size_bytes / fp32.size_bytes,
        speedup_b1=fp32.at_batch(1).median_ms / static.at_batch(1).median_ms,
        speedup_b32=fp32.at_batch(32).median_ms / static.at_batch(32).median_ms,
        overhead_bytes=static.size_bytes - constants,
        confusion=confusion(answers, labels, len(job.class_names)),
        mistakes=worst_mistakes(answers, labels, job.rows.row_ids, WORST_MISTAKES),
        num_threads=job.config.num_threads,
        cpu_features=job.features,
        reduce_range=needs_reduced_range(job.features),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        config=to_dict(job.config),
        created_at=iso_utc(job.clock.now()),
        seconds=0.0,
    )
