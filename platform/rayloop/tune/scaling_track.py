"""Points and what they say -> MLflow runs: one for the whole, one a point, by the driver alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rayloop.config import Config, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.start import tracked
from rayloop.tune.scaling import AXES, Point
from rayloop.tune.scaling_point import Run

TOLD = ("now", "predicted", "low", "high", "change", "change_low", "change_high")


class ScalingTracking:
    """The parent run of a scaling measurement and one child a point.

    Args:
        config: All settings, `run_id` filled in.
        tracker: The database.
        storage: The root, for where the data lies.
        dataset: What is trained on.
    """

    def __init__(
        self, config: Config, tracker: Tracker, storage: Storage, dataset: DatasetVersion
    ) -> None:
        self._config, self._tracker = config, tracker
        self._dataset = tracked(dataset, storage)
        self._parent = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the parent run; it is told if the block fails."""
        config = self._config
        self._parent = self._tracker.start_run(
            config.run_id, to_dict(config), {"rayloop.kind": "scaling"}, dataset=self._dataset
        )
        with self._tracker.told_if_it_fails(self._parent):
            yield

    def add(self, point: Point, row: Mapping[str, Any], runs: Sequence[Run]) -> None:
        """Record a point whose runs are over; one that is there already stays as it is.

        Args:
            point: The point.
            row: Its figures, as `rayloop.tune.scaling.point_rows` gives them.
            runs: Its runs, in order of their seeds; each is a step.
        """
        run_id = self._tracker.start_run(
            f"{self._config.run_id}-{point.name}",
            to_dict(point.config),
            {"rayloop.kind": "scaling point"},
            parent=self._config.run_id,
            dataset=self._dataset,
        )
        for step, run in enumerate(runs):
            figures = {"val_error": run.val_error, "val_loss": run.val_loss}
            named = {f"seed_{name}": value for name, value in figures.items()}
            self._tracker.log_metrics(run_id, named, step)
        self._tracker.log_metrics(run_id, {**row, "diverged": len(row["diverged"])})
        self._tracker.finish(run_id, "FINISHED" if row["runs"] else "FAILED")

    def conclude(self, last: Mapping[str, Any], picture: bytes) -> None:
        """Record what twice as much would give, and end the run of the whole.

        Args:
            last: The job's last line.
            picture: A PNG.
        """
        figures = {
            f"{axis}_doubling_{name}": last[f"{axis}_doubling"][name]
            for axis in AXES
            if last[f"{axis}_doubling"]
            for name in TOLD
        }
        self._tracker.log_metrics(self._parent, figures)
        self._tracker.log_picture(self._parent, "scaling.png", picture)
        self._tracker.finish(self._parent)
