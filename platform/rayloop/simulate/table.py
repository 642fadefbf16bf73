"""Settings -> predictions for each number of workers, as a table to read and as plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayloop.config import Config, SimulateConfig
from rayloop.errors import ConfigError
from rayloop.simulate.calibration import Calibration, load_calibration
from rayloop.simulate.measured import LAPTOP
from rayloop.simulate.network import Link
from rayloop.simulate.prediction import Plan, Prediction, predict
from rayloop.simulate.recorded import calibration_of_run
from rayloop.storage import Storage

BYTES_PER_GBIT = 1e9 / 8
MICROSECOND = 1e-6
DIGITS = 6
"""Significant digits of the figures in the last line."""
HEAD = ("workers", "rows/step", "rows/s", "efficiency", "exchange", "bubble", "waiting", "failures",
        "checkpoint", "kept", "goodput", "run", "cost")  # fmt: skip


def simulate(config: Config, storage: Storage) -> tuple[list[str], dict[str, Any]]:
    """Predict every number of workers that is asked for.

    Args:
        config: All settings.
        storage: The root, for the runs that were measured.

    Returns:
        The lines of a table, and the job's last line.

    Raises:
        RequestError: The calibration cannot be had, or a plan cannot be made.
    """
    calibration = choose_calibration(config.simulate, storage)
    plans = [_plan(config.simulate, calibration, workers) for workers in config.simulate.workers]
    predictions = [predict(plan, calibration) for plan in plans]
    lines = [f"Calibration: {calibration.name} ({calibration.source})", *_lines(predictions)]
    return lines, {
        "calibration": calibration.name,
        "source": calibration.source,
        "plans": [_plain(prediction) for prediction in predictions],
    }


def choose_calibration(settings: SimulateConfig, storage: Storage) -> Calibration:
    """The named file's, else the named or newest run's, else the one that comes with rayloop.

    Raises:
        RequestError: What is named is not there or cannot be read.
    """
    if settings.calibration:
        path = Path(settings.calibration).absolute()
        return load_calibration(Storage(str(path.parent)), path.name)
    if settings.run or storage.exists("runs/latest.json"):
        return calibration_of_run(storage, settings.run)
    return LAPTOP


def _plan(settings: SimulateConfig, calibration: Calibration, workers: int) -> Plan:
    replicas = max(1, workers // settings.stages)
    rows = settings.rows_per_replica or calibration.rows_per_worker
    if settings.keeps == "global_batch":
        rows = settings.global_batch_size / replicas
        if rows < 1:
            raise ConfigError(
                f"simulate.global_batch_size={settings.global_batch_size} is less than a row for "
                f"each of {replicas} replicas. Use a larger one, fewer --simulate.workers, or "
                "--simulate.keeps rows."
            )
    spot = settings.spot
    return Plan(
        workers=workers,
        rows=rows,
        between=Link(
            latency_s=settings.link_latency_us * MICROSECOND,
            bytes_per_s=settings.link_gbit_per_s * BYTES_PER_GBIT,
        ),
        workers_per_node=settings.workers_per_node,
        failures_per_worker_day=settings.failures_per_worker_day
        + spot * settings.spot_failures_per_worker_day,
        price_per_worker_hour=settings.price_per_worker_hour
        * (settings.spot_price_share if spot else 1.0),
        run_rows=settings.run_rows or calibration.run_rows,
        stages=settings.stages,
        micro_batches=settings.micro_batches,
        chunks=settings.chunks,
    )


def _lines(predictions: Sequence[Prediction]) -> list[str]:
    rows = [HEAD, *(_cells(prediction) for prediction in predictions)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    starred = [p for p in predictions if p.extrapolated]
    if not starred:
        return [*table, "Every row lies within what was measured."]
    last = starred[-1]
    return [
        *table,
        f"* beyond what was measured. With {last.workers} workers: {'; '.join(last.extrapolated)}.",
    ]


def _cells(prediction: Prediction) -> tuple[str, ...]:
    return (
        f"{prediction.workers:,}{'*' if prediction.extrapolated else ' '}",
        f"{prediction.global_batch_size:,.0f}",
        f"{prediction.rows_per_s:,.0f}",
        f"{prediction.efficiency:.1%}",
        f"{prediction.exchange_share:.1%}",
        f"{prediction.bubble_share:.1%}",
        f"{prediction.wait_share:.1%}",
        f"{prediction.failures:.3g}",
        _duration(prediction.checkpoint_every_s),
        f"{prediction.kept:.1%}",
        f"{prediction.goodput:.1%}",
        _duration(prediction.run_s),
        "never ends" if math.isinf(prediction.cost) else f"{prediction.cost:,.2f}",
    )


def _duration(seconds: float) -> str:
    if math.isinf(seconds):
        return "never ends"
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _plain(prediction: Prediction) -> dict[str, Any]:
    """Its numbers for JSON, which knows no infinity: None."""
    return {
        name: _rounded(value) if isinstance(value, float) else value
        for name, value in asdict(prediction).items()
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
