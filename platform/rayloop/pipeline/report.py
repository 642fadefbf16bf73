"""The evidence of one turn of the loop -> one HTML file that needs nothing outside itself."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayloop.data.versions import SPLITS, DatasetVersion
from rayloop.drawing import in_both_looks
from rayloop.pipeline import page, sections
from rayloop.pipeline.pictures import grid_png
from rayloop.pipeline.sections import percent, size
from rayloop.quantize.methods import FP32, INT8_STATIC
from rayloop.quantize.result import QuantizeResult
from rayloop.registry.release import ReleaseRecord
from rayloop.storage import Storage
from rayloop.train.curves import draw_curves
from rayloop.train.result import TrainResult

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the stages found out, and pictures of what they saw.

    Attributes:
        train: The training run.
        dataset: What it was trained on.
        quantized: The compared methods; the confusion matrix and the mistakes are of static INT8.
        release: The registered version; None when nothing was registered.
        served: `served_accuracy`, `served_requests`, `failed_requests`, `p50_ms`, `p99_ms` and
            `latencies_ms` (a list); None when nothing was served.
        summary: The last line of the job.
        originals: Sample training images, uint8, shape (N, H, W, C), 1 or 3 channels.
        augmented: R augmented versions of each of them, uint8, shape (R, N, H, W, C).
        mistake_images: The images of `quantized.mistakes` in their order, uint8 (M, H, W, C).
        seconds_by_stage: Wall time by stage, in the order they ran.
    """

    train: TrainResult
    dataset: DatasetVersion
    quantized: QuantizeResult
    release: ReleaseRecord | None
    served: dict[str, Any] | None
    summary: dict[str, Any]
    originals: Images
    augmented: Images
    mistake_images: Images
    seconds_by_stage: dict[str, float]

    def __post_init__(self) -> None:
        if self.originals.shape != self.augmented.shape[1:]:
            raise ValueError(
                f"Evidence.augmented has shape {self.augmented.shape}; give (R, "
                f"{', '.join(map(str, self.originals.shape))}), versions of Evidence.originals."
            )
        if len(self.mistake_images) != len(self.quantized.mistakes):
            raise ValueError(
                f"Evidence.mistake_images holds {len(self.mistake_images)} images for "
                f"{len(self.quantized.mistakes)} mistakes; give one image for each."
            )


def write_report(path: Path, evidence: Evidence) -> None:
    """Write the report in one step: readers see the old file or the whole new one.

    Args:
        path: The HTML file; its folder is made where it is missing.
        evidence: What is shown.
    """
    target = path.resolve()
    Storage(str(target.parent)).write(target.name, render(evidence).encode())


def render(evidence: Evidence) -> str:
    """The report as HTML text."""
    train = evidence.train
    shown = [
        _flow(evidence.seconds_by_stage),
        _samples(evidence),
        _curves(train),
        sections.confusion(evidence.quantized),
        sections.mistakes(evidence.quantized, evidence.mistake_images),
        sections.quantization(evidence.quantized),
        sections.latency(evidence.quantized),
        sections.served(evidence.served),
        _data(evidence.dataset),
        _lineage(evidence),
    ]
    title = f"{train.model_name} on {train.dataset_name}: {train.run_id}"
    return page.page(title, _headline(evidence), shown)


def half_width(share: float, rows: int) -> float:
    """Half of the 95 % Wilson interval of a share (0..1) counted over that many rows, 1 or more."""
    z = 1.96
    return z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)


def _headline(evidence: Evidence) -> str:
    train, quantized = evidence.train, evidence.quantized
    height, width, channels = train.shape
    release = evidence.release
    name = f"{release.model} version {release.version}" if release else "not registered"
    title = page.text(f"{train.model_name} on {train.dataset_name}")
    lead = page.text(
        f"{train.num_parameters:,} parameters, {height}×{width}×{channels} images, "
        f"{len(train.class_names)} classes; {name}; {quantized.created_at}"
    )
    tiles = "".join(_model_tiles(train, quantized) + _served_tiles(evidence.served))
    return f'<h1>{title}</h1><p>{lead}</p><div class="tiles" id="verdict">{tiles}</div>'


def _model_tiles(train: TrainResult, quantized: QuantizeResult) -> list[str]:
    fp32, int8 = quantized.method(FP32), quantized.method(INT8_STATIC)
    spread = 100 * half_width(fp32.accuracy, quantized.test_rows)
    floor = train.floor_accuracy
    against = "no linear floor" if floor is None else f"linear floor {percent(floor)}"
    drop = 100 * (fp32.accuracy - int8.accuracy)
    gate = "passes the gate" if quantized.passed else "refused by the gate"
    sizes = f"{size(fp32.size_bytes)} → {size(int8.size_bytes)}"
    times = f"{fp32.at_batch(1).median_ms:.3g} ms → {int8.at_batch(1).median_ms:.3g} ms"
    return [
        page.tile("fp32 accuracy", percent(fp32.accuracy), f"± {spread:.2f} points; {against}"),
        page.tile(
            "INT8 accuracy",
            percent(int8.accuracy),
            f"{gate}; {-drop:+.2f} points",
            quantized.passed,
        ),
        page.tile("INT8 size", f"{quantized.size_ratio:.3f}×", sizes, quantized.size_ratio < 1),
        page.tile(
            "INT8 speed-up, one row",
            f"{quantized.speedup_b1:.2f}×",
            times,
            quantized.speedup_b1 > 1,
        ),
    ]


def _served_tiles(served: dict[str, Any] | None) -> list[str]:
    if served is None:
        return [page.tile("served", "no", "the model was not served in this turn")]
    requests, failed = served["served_requests"], served["failed_requests"]
    return [
        page.tile("served accuracy", percent(served["served_accuracy"]), _served_note(served)),
        page.tile("failed requests", f"{failed:,}", f"of {requests:,}", failed == 0),
        page.tile("latency p50", f"{served['p50_ms']:.3g} ms", "median of a request"),
        page.tile(
            "latency p99", f"{served['p99_ms']:.3g} ms", "one request in a hundred is slower"
        ),
    ]


def _served_note(served: dict[str, Any]) -> str:
    if "different_answers" not in served:
        return f"over {served['served_requests']:,} requests"
    return f"{served['different_answers']:,} answers differ from offline"


def _flow(seconds_by_stage: dict[str, float]) -> str:
    total = sum(seconds_by_stage.values())
    steps = "".join(
        f"<li>{page.text(name)}<b>{seconds:,.1f} s</b>"
        f'<span class="bar"><i style="width:{100 * seconds / (total or 1):.1f}%"></i></span></li>'
        for name, seconds in seconds_by_stage.items()
    )
    intro = f"One turn of the loop took {total:,.1f} s; the bars are each stage's part of it."
    return page.section("stages", "Stages", intro, f'<ol class="flow">{steps}</ol>')


def _samples(evidence: Evidence) -> str:
    versions = len(evidence.augmented)
    return page.section(
        "samples",
        "What the network saw",
        f"Training images, and below them {versions} augmented versions of each.",
        "<h3>Originals</h3>",
        _grid(evidence.originals[None], "original training images"),
        "<h3>Augmented</h3>",
        _grid(evidence.augmented, "augmented training images"),
    )


def _grid(rows: Images, alt: str) -> str:
    return f'<div class="wide">{page.image(grid_png(rows), alt, "grid")}</div>'


def _curves(train: TrainResult) -> str:
    intro = (
        f"{train.steps:,} steps at {train.images_per_second:,.0f} images/s in {train.precision}; "
        f"{percent(train.data_wait_share)} of that time was spent waiting for data."
    )
    if not train.history:
        return page.section("curves", "Training", intro, "<p>No epoch was finished.</p>")
    drawn = in_both_looks(lambda: draw_curves(train.history, ""))
    picture = page.picture(drawn, "loss, accuracy and learning rate by epoch", "curves")
    return page.section("curves", "Training", intro, picture)


def _data(dataset: DatasetVersion) -> str:
    splits = [name for name in SPLITS if name in dataset.splits]
    rows = [
        (name, *(f"{dataset.class_counts.get(split, {}).get(name, 0):,}" for split in splits))
        for name in dataset.class_names
    ]
    total = ("all", *(f"{dataset.splits[split]:,}" for split in splits))
    refused = [(reason, f"{count:,} rows") for reason, count in dataset.refused.items()]
    notes = [(name.replace("_", " "), f"{count:,} rows") for name, count in dataset.notes.items()]
    return page.section(
        "data",
        "Data",
        f"{dataset.name} version {dataset.version}: rows by class and split.",
        page.table(("class", *splits), [*rows, total], chosen=len(rows)),
        "<h3>Refused rows and copies</h3>",
        page.facts([*(refused or [("refused", "none")]), *notes]),
    )


def _lineage(evidence: Evidence) -> str:
    train, dataset, quantized = evidence.train, evidence.dataset, evidence.quantized
    release = evidence.release
    pairs = [
        ("run", train.run_id),
        ("dataset", f"{dataset.name}:{dataset.version}"),
        ("dataset digest", dataset.digest),
        ("config digest", train.config_digest),
        ("checkpoint", train.checkpoint),
        ("checkpoint digest", train.checkpoint_digest),
        *((f"{row.name} digest", row.sha256) for row in quantized.methods),
    ]
    if release:
        pairs += [("release", f"{release.model}:{release.version}"), ("record", release.digest)]
    pairs += [
        ("tracking run", train.mlflow_run_id or "none"),
        ("machine", " ".join(quantized.cpu_features)),
        ("weights", "7 bits (no VNNI)" if quantized.reduce_range else "8 bits"),
        ("packages", ", ".join(f"{name} {v}" for name, v in quantized.packages.items())),
    ]
    return page.section("lineage", "Lineage", "", page.facts(pairs), _summary(evidence.summary))


def _summary(summary: dict[str, Any]) -> str:
    pairs = [(name, str(value)) for name, value in summary.items()]
    return f"<details><summary>The job's last line</summary>{page.facts(pairs)}</details>"
