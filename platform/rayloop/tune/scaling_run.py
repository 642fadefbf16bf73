"""A configuration -> the points of its scaling as Ray tasks -> curves, a picture, a last line."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import SPARE_CPUS, check_room
from rayloop.config import Config
from rayloop.data.versions import DatasetVersion, Split, open_version, read_split
from rayloop.errors import RayloopError, WorkError
from rayloop.logs import stage_logger
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.claim import new_run_id
from rayloop.tune.scaling import (
    AXES,
    SETTINGS,
    Axis,
    Doubling,
    Point,
    claim_scaling,
    doublings,
    plan_points,
    point_rows,
)
from rayloop.tune.scaling_picture import draw_scaling, scaling_lines
from rayloop.tune.scaling_point import Run, load_point, train_point
from rayloop.tune.scaling_track import ScalingTracking

log = stage_logger("scaling")


@dataclass
class _Results:
    """What is known so far, and where it is told."""

    config: Config
    storage: Storage
    dataset: DatasetVersion
    points: list[Point]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def axes(self) -> list[Axis]:
        return [axis for axis in AXES if getattr(self.config.scaling, SETTINGS[axis])]

    @property
    def picture(self) -> str:
        return f"runs/{self.config.run_id}/scaling.png"

    def add(self, point: Point, run: Run) -> bool:
        """Take a run in; tells whether its point is done."""
        known = self.runs.setdefault(point.name, [])
        known.append(run)
        known.sort(key=lambda each: each.run_id)
        return len(known) == self.config.scaling.seeds

    def row(self, point: Point) -> dict[str, Any]:
        """What a point came to, as plain numbers."""
        return point_rows([point], self.runs, self.dataset.splits["val"])[0]

    def publish(self) -> tuple[list[dict[str, Any]], dict[Axis, Doubling]]:
        """Write `scaling.json` and `scaling.png` from the points that are done."""
        config, val_rows = self.config, self.dataset.splits["val"]
        whole = {
            name: runs for name, runs in self.runs.items() if len(runs) == config.scaling.seeds
        }
        rows = point_rows(self.points, whole, val_rows)
        found = doublings(self.points, whole, config.train.seed)
        self.storage.write_json(
            f"runs/{config.run_id}/scaling.json",
            {
                "run_id": config.run_id,
                "dataset": f"{self.dataset.name}:{self.dataset.version}",
                "epochs": config.train.epochs,
                "data_keeps": config.scaling.data_keeps,
                "learning_rate_rule": config.train.learning_rate_rule,
                "seeds": config.scaling.seeds,
                "val_rows": val_rows,
                "points": rows,
                "doublings": {axis: asdict(told) for axis, told in found.items()},
            },
        )
        title = (
            f"{config.run_id}: {config.model.name} on {self.dataset.name}, "
            f"epochs {config.train.epochs:g}, {config.scaling.seeds} seeds a point"
        )
        png = draw_scaling(rows, found, self.axes, title, val_rows)
        self.storage.write(self.picture, png)
        return rows, found


def measure_scaling(
    config: Config, storage: Storage, tracker: Tracker, clock: Clock = SYSTEM_CLOCK
) -> dict[str, Any]:
    """Train all points on the connected cluster, or go on with them, and give the last line.

    The test split is not touched, and no run becomes the newest one.

    Args:
        config: All settings; an empty `run_id` gets a new name.
        storage: The root.
        tracker: Gets a run for the whole and one for each point.
        clock: For names and times.

    Raises:
        RequestError: The data is missing, a point cannot be trained, the cluster is too small, or
            the run id belongs to other settings.
        WorkError: A task failed more often than `train.max_failures`, or every run diverged.
    """
    began_s = clock.monotonic()
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    config = replace(config, run_id=config.run_id or f"scaling-{new_run_id(config, clock)}")
    cpus = config.train.cpus_per_worker or 1
    config = replace(
        config,
        data=replace(config.data, version=dataset.version),
        train=replace(config.train, cpus_per_worker=cpus),
    )
    points = plan_points(config, dataset)
    at_once = _room(config)
    claim_scaling(config, dataset, storage)
    results = _Results(config, storage, dataset, points)
    log.info(
        "run %s: %d points with %d seeds each, %d at once",
        config.run_id, len(points), config.scaling.seeds, at_once,
    )  # fmt: skip
    done, waiting = _divide(points, storage)
    if done:
        log.info("%d runs are done already; they are not trained again", len(done))
    total = len(done) + len(waiting)
    tracking = ScalingTracking(config, tracker, storage, dataset)
    with tracking.running():
        for point, run in done:
            if results.add(point, run):
                tracking.add(point, results.row(point), results.runs[point.name])
        trained = _run_all(waiting, storage, dataset, at_once)
        for count, (point, run) in enumerate(trained, start=len(done) + 1):
            _tell(run, count, total)
            if results.add(point, run):
                tracking.add(point, results.row(point), results.runs[point.name])
                results.publish()
        rows, found = results.publish()
        if not any("val_error" in row for row in rows):
            raise WorkError(
                f"Every run of {config.run_id} diverged. Lower --train.learning_rate, or use "
                "--train.precision fp32."
            )
        for line in scaling_lines(rows, found, results.axes):
            log.info("%s", line)
        last = _last_line(results, rows, found, round(clock.monotonic() - began_s, 3))
        tracking.conclude(last, storage.read(results.picture))
    return last


def _room(config: Config) -> int:
    """Tasks that may run at once, some CPUs kept for the driver; at least one must fit."""
    train = config.train
    check_room(1, train.cpus_per_worker, train.use_gpu)
    there: dict[str, float] = cast(Any, ray).cluster_resources()
    places = int((there.get("CPU", 0.0) - SPARE_CPUS) // train.cpus_per_worker)
    if train.use_gpu:
        places = min(places, int(there.get("GPU", 0.0)))
    return max(1, places)


def _divide(
    points: Sequence[Point], storage: Storage
) -> tuple[list[tuple[Point, Run]], list[tuple[Point, Config]]]:
    """The runs that are over, and the settings of those that are not, cheapest first."""
    done: list[tuple[Point, Run]] = []
    waiting: list[tuple[Point, Config]] = []
    for point in points:
        for config in point.runs():
            run = load_point(config, storage)
            if run:
                done.append((point, run))
            else:
                waiting.append((point, config))
    return done, waiting


def _run_all(
    waiting: Sequence[tuple[Point, Config]],
    storage: Storage,
    dataset: DatasetVersion,
    at_once: int,
) -> Iterator[tuple[Point, Run]]:
    """Train in Ray tasks, in the given order, so many at once; each run as it ends."""
    if not waiting:
        return
    splits = [ray.put(read_split(storage, dataset, name)) for name in ("train", "val")]
    train = waiting[0][1].train
    task = ray.remote(
        num_cpus=train.cpus_per_worker,
        num_gpus=1 if train.use_gpu else 0,
        max_retries=int(train.max_failures),
    )(_train)
    left = deque(waiting)
    going: dict[Any, Point] = {}
    while left or going:
        while left and len(going) < at_once:
            point, config = left.popleft()
            going[task.remote(config, storage, dataset, *splits)] = point
        (ended, *_), _ = ray.wait(list(going), num_returns=1)
        yield going.pop(ended), _result_of(ended)


def _train(
    config: Config, storage: Storage, dataset: DatasetVersion, train: Split, val: Split
) -> Run:
    torch.set_num_threads(config.train.cpus_per_worker)
    return train_point(config, storage, dataset, {"train": train, "val": val})


def _result_of(reference: Any) -> Run:
    try:
        run: Run = ray.get(reference)
        return run
    except RayTaskError as error:
        if isinstance(error.cause, RayloopError):
            raise error.cause from None
        raise
    except RayError as error:
        raise WorkError(
            f"A scaling task failed again and again: {error}. What is done is kept; run again with "
            "the same --run-id to go on."
        ) from error


def _tell(run: Run, count: int, total: int) -> None:
    if run.diverged:
        log.warning("%d/%d %s is left out: %s", count, total, run.run_id, run.diverged)
        return
    log.info(
        "%d/%d %s: validation error %.2f%%, loss %.4f, %.0f images/s",
        count, total, run.run_id, 100 * run.val_error, run.val_loss, run.images_per_second,
    )  # fmt: skip


def _last_line(
    results: _Results,
    rows: list[dict[str, Any]],
    found: Mapping[Axis, Doubling],
    seconds: float,
) -> dict[str, Any]:
    long = ("runs", "val_errors", "val_losses", "axes")
    batch_of = {point.name: point.sizes["batch"] for point in results.points}
    images = sum(run.steps * batch_of[name] for name, runs in results.runs.items() for run in runs)
    return {
        "run_id": results.config.run_id,
        "points": [
            {name: value for name, value in row.items() if name not in long}
            | {"seeds": len(row["runs"]), "diverged": len(row["diverged"])}
            for row in rows
        ],
        **{
            f"{axis}_doubling": found[axis].plain() if axis in found else None for axis in AXES
        },
        "trained_epochs": round(images / results.dataset.splits["train"], 2),
        "seconds": seconds,
        "picture": results.storage.path(results.picture),
    }  # fmt: skip
