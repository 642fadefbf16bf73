"""A configuration -> every stage in order -> a summary, and the evidence for the report."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import Config
from rayloop.data.order import SampleOrder
from rayloop.data.prepare import prepare
from rayloop.data.transforms import augment, choose
from rayloop.data.versions import DatasetVersion, Split, read_split
from rayloop.errors import GateRefused, WorkError
from rayloop.logs import stage_logger
from rayloop.pipeline.report import Evidence, render, write_report
from rayloop.quantize.result import QuantizeResult, quantize_folder
from rayloop.quantize.run import quantize
from rayloop.registry.register import Registered, register
from rayloop.serve.client import TrafficReport, send_images
from rayloop.serve.run import choose_port, serving
from rayloop.storage import Storage
from rayloop.submit.arrival import SUBMITTED
from rayloop.tracking import Tracker
from rayloop.train.claim import new_run_id
from rayloop.train.result import TrainResult
from rayloop.train.run import train

log = stage_logger("pipeline")

SAMPLE_IMAGES = 12
SAMPLE_VERSIONS = 5


@dataclass
class Stopwatch:
    """Seconds by stage, in the order they were run."""

    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and book its time."""
        log.info("— %s", name)
        before = self.clock.monotonic()
        yield
        self.seconds[name] = round(self.clock.monotonic() - before, 2)


def run_pipeline(
    config: Config, storage: Storage, tracker: Tracker, clock: Clock = SYSTEM_CLOCK
) -> dict[str, Any]:
    """Run all stages on the connected cluster, write the report, and give the last line.

    Args:
        config: All settings; the run id names the training run.
        storage: The root.
        tracker: Where the run is tracked, on the driver only.
        clock: For names and times.

    Raises:
        RayloopError: As the stages do. A model that fails a gate is not served, and answers that
            differ from the offline ones are a `WorkError`; the report is written all the same.
    """
    config = replace(config, run_id=config.run_id or new_run_id(config, clock))
    if config.pipeline.serve:
        choose_port(config.serve)  # a port in use is said now, not after the training
    watch = Stopwatch(clock)
    with watch.stage("prepare data"):
        dataset = prepare(config.data, storage, clock).dataset
    with watch.stage("train"):
        trained = train(config, storage, tracker, clock)
    with watch.stage("quantize"):
        quantized = quantize(storage, config.quantize, config.run_id)
    if not quantized.passed:
        raise GateRefused(f"No INT8 model of run {config.run_id} passes the gate: {quantized.gate}")
    with watch.stage("register"):
        registered = register(storage, config, clock)
    test = read_split(storage, dataset, "test")
    served: dict[str, Any] | None = None
    if config.pipeline.serve:
        with watch.stage("serve"):
            served = _serve_and_compare(config, storage, registered, test)
    summary = _summary(config, dataset, trained, quantized, registered, served)
    summary["seconds_by_stage"] = watch.seconds
    summary["seconds"] = round(sum(watch.seconds.values()), 1)
    evidence = _evidence(config, storage, dataset, trained, quantized, registered, served, summary)
    report = config.pipeline.report
    if SUBMITTED in os.environ and not Path(report).is_absolute():
        report = f"runs/{config.run_id}/report.html"  # the working folder goes away with the job
        storage.write(report, render(evidence).encode())
        report = storage.path(report)
    else:
        write_report(Path(report), evidence)
    summary["report"] = report
    if served is not None and (served["different_answers"] or served["failed_requests"]):
        raise WorkError(
            f"{served['different_answers']} of {served['served_requests']} answers differ from the "
            f"offline ones and {served['failed_requests']} requests failed; see {report}."
        )
    return summary


def _serve_and_compare(
    config: Config, storage: Storage, registered: Registered, test: Split
) -> dict[str, Any]:
    """Serve the registered version, send it the test images, compare with the offline answers."""
    version = f":{registered.release.version}"
    with serving(
        config.serve, config.registry, storage.root, version=version, events=config.events
    ) as url:
        log.info("%s answers; sending %d images", url, config.pipeline.traffic_requests)
        traffic = send_images(
            url,
            test.images,
            config.pipeline.traffic_requests,
            config.pipeline.traffic_connections,
            config.registry.model,
        )
    return compare_traffic(traffic, test.labels, _offline_classes(storage, config.run_id))


def _offline_classes(storage: Storage, run_id: str) -> npt.NDArray[np.int64]:
    content = storage.read(f"{quantize_folder(run_id)}/predictions.npz")
    with np.load(io.BytesIO(content)) as arrays:
        order = np.argsort(arrays["row_ids"])
        return arrays["class_index"][order].astype(np.int64)  # type: ignore[no-any-return]


def compare_traffic(
    traffic: TrafficReport, labels: npt.NDArray[np.int64], offline: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """What the traffic showed, beside what the same model said offline of the same rows.

    Args:
        traffic: The round; request i carried row i modulo N.
        labels: True classes, shape (N,).
        offline: Classes the model chose offline, shape (N,).
    """
    rows = np.arange(traffic.requests) % len(labels)
    answered = traffic.predictions >= 0
    right = (traffic.predictions == labels[rows]) & answered
    return {
        "served_accuracy": float(right[answered].mean()) if answered.any() else 0.0,
        "offline_accuracy_same_rows": float((offline[rows] == labels[rows])[answered].mean()),
        "different_answers": int((traffic.predictions != offline[rows])[answered].sum()),
        "served_requests": traffic.requests,
        "failed_requests": traffic.failed,
        "requests_per_second": round(traffic.requests / traffic.seconds, 1),
        "p50_ms": round(traffic.percentile_ms(50), 2),
        "p99_ms": round(traffic.percentile_ms(99), 2),
        "latencies_ms": [round(float(value), 2) for value in traffic.latencies_ms],
    }


def _summary(
    config: Config,
    dataset: DatasetVersion,
    trained: TrainResult,
    quantized: QuantizeResult,
    registered: Registered,
    served: dict[str, Any] | None,
) -> dict[str, Any]:
    chosen, fp32 = quantized.method(quantized.chosen), quantized.method("fp32")
    return {
        "run_id": config.run_id,
        "dataset_digest": dataset.digest,
        "checkpoint_digest": trained.checkpoint_digest,
        "val_accuracy": trained.val_accuracy,
        "test_accuracy_fp32": fp32.accuracy,
        "test_accuracy_int8": chosen.accuracy,
        "agreement": chosen.agreement,
        "floor_accuracy": trained.floor_accuracy,
        "size_ratio": round(chosen.size_bytes / fp32.size_bytes, 4),
        "speedup_b1": round(fp32.at_batch(1).median_ms / chosen.at_batch(1).median_ms, 3),
        "speedup_b32": round(fp32.at_batch(32).median_ms / chosen.at_batch(32).median_ms, 3),
        "images_per_second": trained.images_per_second,
        "data_wait_share": trained.data_wait_share,
        "model": registered.release.model,
        "version": registered.release.version,
        "alias": registered.alias,
        **{k: v for k, v in (served or {}).items() if k != "latencies_ms"},
    }


def _evidence(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    trained: TrainResult,
    quantized: QuantizeResult,
    registered: Registered,
    served: dict[str, Any] | None,
    summary: dict[str, Any],
) -> Evidence:
    train_rows, test = (read_split(storage, dataset, name) for name in ("train", "test"))
    originals, augmented = augmented_samples(config, train_rows)
    return Evidence(
        train=trained,
        dataset=dataset,
        quantized=quantized,
        release=registered.release,
        served=served,
        summary=summary,
        originals=originals,
        augmented=augmented,
        mistake_images=test.images[[mistake.row_id for mistake in quantized.mistakes]],
        seconds_by_stage=summary["seconds_by_stage"],
    )


def augmented_samples(
    config: Config, rows: Split
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A few training images, and each as the network saw it in several epochs.

    Returns:
        Originals (N, H, W, C) and augmented images (R, N, H, W, C).
    """
    order = SampleOrder(len(rows), min(SAMPLE_IMAGES, len(rows)), config.train.seed)
    chosen, _ = order.rows(0)
    images, augmentation = torch.from_numpy(rows.images[chosen]), config.train.augment
    versions = [
        augment(
            images,
            choose(
                augmentation, config.train.seed, epoch, chosen, np.full(len(chosen), epoch),
                slice(None),
            ),
            augmentation,
        ).numpy()
        for epoch in range(SAMPLE_VERSIONS)
    ]  # fmt: skip
    return rows.images[chosen], np.stack(versions)
