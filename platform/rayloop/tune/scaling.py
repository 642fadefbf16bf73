"""A configuration -> the points that show what scaling it buys -> what twice as much would give.

One thing is varied at a time around the configuration itself, which is the point all axes share:
the share of the training rows, the widths of the network, the rows of a step. All else stays, the
number of epochs too: with half the rows, or twice the batch, a run has half the steps. Where the
steps are few that alone decides, so `scaling.data_keeps` can hold them instead of the epochs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from rayloop.config import Config, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.errors import ConfigError
from rayloop.models.classifier import count_parameters
from rayloop.storage import Storage
from rayloop.tracking import flatten
from rayloop.train.claim import deciding_settings
from rayloop.train.start import initial_model, order_of, refuse_useless
from rayloop.tune.scaling_fit import (
    LEAST_POINTS,
    Forecast,
    Form,
    Measured,
    binomial_deviation,
    forecast,
    row_noise,
)
from rayloop.tune.scaling_point import Run

Axis = Literal["data", "parameters", "batch"]
AXES: tuple[Axis, ...] = ("data", "parameters", "batch")
SETTINGS = {"data": "data_shares", "parameters": "width_factors", "batch": "batch_factors"}
UNITS = {"data": "training rows", "parameters": "parameters", "batch": "rows in a step"}
WITH_WIDTHS = ("fastnet", "tiny_resnet")
WIDTH_MULTIPLE = 8
BASE = "base"
MOST_DIFFERENCES = 5
"""That are named where a run id stands for other settings."""
DECIMALS = 6
"""Of the figures in the last line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One configuration that is trained with several seeds.

    Attributes:
        name: Such as `data-0.125`; the configuration itself is `base`.
        axes: Those it stands on.
        config: Its settings, the run id that of the whole and the seed the first.
        sizes: Training rows, parameters and rows in a step, by axis.
    """

    name: str
    axes: tuple[Axis, ...]
    config: Config
    sizes: dict[Axis, int]

    @property
    def cost(self) -> float:
        """Rises with the work of a run; smaller points are trained first."""
        return float(self.config.train.epochs) * self.sizes["data"] * self.sizes["parameters"]

    def runs(self) -> list[Config]:
        """The settings of its runs, one a seed."""
        config = self.config
        return [
            replace(
                config,
                run_id=f"{config.run_id}-{self.name}-s{index}",
                train=replace(config.train, seed=config.train.seed + index),
            )
            for index in range(config.scaling.seeds)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubling:
    """What the points of an axis say of twice as much.

    Attributes:
        axis: What is doubled.
        val_error: Share (0..1) of validation rows predicted wrong.
        val_loss: Mean cross-entropy on the validation split.
        images_per_second: Of the training; only for the batch size.
        held_out: What the other points say of the largest one's error, as a trial of the curve;
            only for data and parameters, and where three are left.
    """

    axis: Axis
    val_error: Forecast
    val_loss: Forecast
    images_per_second: Forecast | None = None
    held_out: Forecast | None = None

    def plain(self) -> dict[str, Any]:
        """Its numbers for the job's last line: the error's own, the others' below them."""
        told = {
            name: _plain(value)
            for name, value in (
                ("val_loss", self.val_loss),
                ("images_per_second", self.images_per_second),
            )
            if value
        }
        if self.held_out:
            tried = _plain(self.held_out)
            told["held_out"] = {name: tried[name] for name in ("predicted", "low", "high", "model")}
            told["held_out"]["measured"] = round(self.val_error.now, DECIMALS)
        return {"metric": "val_error", **_plain(self.val_error), **told}


def _plain(value: Forecast) -> dict[str, Any]:
    long = ("curve", "coefficients", "weights")
    return {
        name: round(field, DECIMALS) if isinstance(field, float) else field
        for name, field in asdict(value).items()
        if name not in long
    }


def plan_points(config: Config, dataset: DatasetVersion) -> list[Point]:
    """The points to train, those that cost least first.

    Runs train alone, each on one worker: `train.num_workers` decides nothing here but with plain
    batch norm, whose groups are then the whole step.

    Args:
        config: All settings, `run_id` filled in.
        dataset: The dataset version.

    Raises:
        RequestError: An axis has too few different points, or a point cannot be trained.
    """
    train = config.train
    alone = replace(config, train=replace(train, num_workers=1, min_workers=0))
    points = [_point(BASE, (), alone, dataset)]
    scaling = config.scaling
    for share in scaling.data_shares:
        shared = replace(alone.train, data_share=share)
        if scaling.data_keeps == "steps":
            shared = replace(shared, epochs=train.epochs * train.data_share / share)
        changed = replace(alone, train=shared)
        points.append(_point(f"data-{share:.10g}", ("data",), changed, dataset))
    for factor in scaling.width_factors:
        widths = _scaled_widths(config, factor)
        changed = replace(alone, model=replace(alone.model, widths=widths))
        points.append(_point(f"width-{factor:.10g}", ("parameters",), changed, dataset))
    for factor in scaling.batch_factors:
        size = _scaled_batch(config, factor)
        changed = replace(alone, train=replace(alone.train, global_batch_size=size))
        points.append(_point(f"batch-{factor:.10g}", ("batch",), changed, dataset))
    return sorted(_distinct(points, config), key=lambda point: point.cost)


def _point(name: str, axes: tuple[Axis, ...], config: Config, dataset: DatasetVersion) -> Point:
    rows = order_of(config.train, dataset).num_rows
    batch = config.train.global_batch_size
    if rows < batch:
        least = batch / dataset.splits["train"]
        remedy = "larger --train.data_share"
        if axes == ("data",):
            remedy = f"--scaling.data_shares from {least:.3g} on"
        elif axes == ("batch",):
            remedy = "smaller --scaling.batch_factors"
        raise ConfigError(
            f"scaling's point {name} has {rows} of the {dataset.splits['train']} training rows of "
            f"{dataset.name}:{dataset.version} and steps of {batch} rows, more than there are. "
            f"Use {remedy}, or a smaller --train.global_batch_size."
        )
    model = initial_model(config, dataset)
    refuse_useless(config, dataset, model)
    sizes: dict[Axis, int] = {"data": rows, "parameters": count_parameters(model), "batch": batch}
    return Point(name=name, axes=axes, config=config, sizes=sizes)


def _scaled_widths(config: Config, factor: float) -> tuple[int, ...]:
    """Widths times a factor, to multiples of 8 where the preset's are such."""
    model = config.model
    if model.name not in WITH_WIDTHS:
        raise ConfigError(
            f"model.name={model.name!r} has no widths that scaling.width_factors could change. Use "
            f"one of {', '.join(WITH_WIDTHS)}, or leave the axis out: --scaling.width_factors "
            "with no number."
        )
    multiple = math.gcd(WIDTH_MULTIPLE, *model.widths)
    return tuple(max(1, round(factor * width / multiple)) * multiple for width in model.widths)


def _scaled_batch(config: Config, factor: float) -> int:
    """The batch size times a factor, which must fit the norms and the workers as the preset's."""
    train = config.train
    size = factor * train.global_batch_size
    unit = math.lcm(train.num_workers, train.norm_group_rows or 1)
    unit = math.gcd(unit, train.global_batch_size)
    if size != round(size) or round(size) % unit:
        raise ConfigError(
            f"scaling.batch_factors has {factor:g}, which makes a step of {size:g} rows from "
            f"train.global_batch_size={train.global_batch_size}; it must be a multiple of {unit} "
            f"(train.num_workers={train.num_workers}, "
            f"train.norm_group_rows={train.norm_group_rows}). Use factors such as 0.5, 1, 2, 4."
        )
    return round(size)


def _distinct(points: Sequence[Point], config: Config) -> list[Point]:
    """Each configuration once, the base on every axis that is asked for; at least 3 on each."""
    asked = tuple(axis for axis in AXES if getattr(config.scaling, SETTINGS[axis]))
    if not asked:
        names = ", ".join(f"--scaling.{name}" for name in SETTINGS.values())
        raise ConfigError(f"scaling varies nothing: {names} are all empty. Give one of them.")
    kept = {tuple(points[0].sizes.values()): replace(points[0], axes=asked)}
    for point in points[1:]:
        kept.setdefault(tuple(point.sizes.values()), point)
    for axis in asked:
        count = sum(axis in point.axes for point in kept.values())
        if count < LEAST_POINTS:
            name = SETTINGS[axis]
            raise ConfigError(
                f"scaling.{name}={getattr(config.scaling, name)} makes {count} different "
                f"{'points' if count > 1 else 'point'} of {UNITS[axis]}, the configuration's own "
                f"included; a curve needs {LEAST_POINTS}. Add numbers that differ more, or leave "
                f"the axis out: --scaling.{name} with no number."
            )
    return list(kept.values())


def claim_scaling(config: Config, dataset: DatasetVersion, storage: Storage) -> None:
    """Write what is to be measured, or refuse a run id that stands for something else.

    Args:
        config: All settings, `run_id` filled in.
        dataset: The dataset version.
        storage: The root.

    Raises:
        ConfigError: Names the first few differences.
    """
    folder = f"runs/{config.run_id}"
    path = f"{folder}/scaling_plan.json"
    mine = {
        **deciding_settings(config),
        "scaling": to_dict(config.scaling),
        "dataset_digest": dataset.digest,
    }
    if not storage.exists(path):
        if storage.names(folder):
            raise ConfigError(
                f"Run {config.run_id!r} exists and is no scaling run. Use another --run-id."
            )
        storage.write_json(path, mine)
        return
    old, new = flatten(storage.read_json(path)), flatten(mine)
    differences = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ConfigError(
            f"Scaling run {config.run_id!r} exists with other settings: "
            f"{'; '.join(differences[:MOST_DIFFERENCES])}. Use the same settings to continue it, "
            "or another --run-id."
        )


def doublings(
    points: Sequence[Point], runs: Mapping[str, Sequence[Run]], seed: int
) -> dict[Axis, Doubling]:
    """What twice as much would give, for each axis that has enough points so far.

    For data and parameters "now" is the largest point, and twice that lies beyond all that was
    trained. For the batch "now" is the configuration's own: twice that was trained, and the other
    sizes help to say it.

    Args:
        points: All points.
        runs: Finished runs of a point, by its name; those that diverged are left out.
        seed: Decides the redrawn measurements.
    """
    found: dict[Axis, Doubling] = {}
    for axis in AXES:
        here = [point for point in points if axis in point.axes and _sound(runs, point)]
        here.sort(key=lambda point: point.sizes[axis])
        own = [point for point in here if point.name == BASE] if axis == "batch" else here[-1:]
        told = _doubling(axis, here, runs, own[0].sizes[axis], seed) if own else None
        if told:
            found[axis] = told
    return found


def _sound(runs: Mapping[str, Sequence[Run]], point: Point) -> list[Run]:
    return [run for run in runs.get(point.name, ()) if not run.diverged]


def _doubling(
    axis: Axis,
    points: Sequence[Point],
    runs: Mapping[str, Sequence[Run]],
    now: int,
    seed: int,
) -> Doubling | None:
    of_points = [_sound(runs, point) for point in points]
    x = [float(point.sizes[axis]) for point in points]
    form: Form = "parabola" if axis == "batch" else "power"
    error = forecast(_errors(x, of_points, form), now, 2 * now, seed)
    loss = forecast(_losses(x, of_points, form), now, 2 * now, seed)
    if not error or not loss:
        return None
    if axis == "batch":
        speed = _speed(x, of_points, now, seed)
        return Doubling(axis=axis, val_error=error, val_loss=loss, images_per_second=speed)
    tried = forecast(_errors(x[:-1], of_points[:-1], form), x[-2], x[-1], seed)
    return Doubling(axis=axis, val_error=error, val_loss=loss, held_out=tried)


def _errors(x: Sequence[float], of_points: Sequence[Sequence[Run]], form: Form) -> Measured:
    noise = row_noise([np.stack([run.wrong for run in of]) for of in of_points], is_share=True)
    values = [[run.val_error for run in of] for of in of_points]
    return Measured(x=x, values=values, noise=noise, form=form, upper=1.0)


def _losses(x: Sequence[float], of_points: Sequence[Sequence[Run]], form: Form) -> Measured:
    noise = row_noise([np.stack([run.losses for run in of]) for of in of_points], is_share=False)
    values = [[run.val_loss for run in of] for of in of_points]
    return Measured(x=x, values=values, noise=noise, form=form)


def _speed(
    x: Sequence[float], of_points: Sequence[Sequence[Run]], now: int, seed: int
) -> Forecast | None:
    """Images a second at twice the batch, from the runs that measured some."""
    speeds = [_speeds(of) for of in of_points]
    kept = [(size, values) for size, values in zip(x, speeds, strict=True) if values]
    if now not in (size for size, _ in kept):
        return None
    sizes, values = zip(*kept, strict=True)
    measured = Measured(x=sizes, values=values, form="parabola", is_ratio=True)
    return forecast(measured, now, 2 * now, seed)


def _speeds(runs: Sequence[Run]) -> list[float]:
    return [run.images_per_second for run in runs if run.images_per_second > 0]


def point_rows(
    points: Sequence[Point], runs: Mapping[str, Sequence[Run]], val_rows: int
) -> list[dict[str, Any]]:
    """What each point came to, as plain numbers, in the order of the axes and sizes.

    `val_error_binomial` is the standard deviation that the number of validation rows alone gives
    one run's error.

    Args:
        points: All points.
        runs: Finished runs of a point, by its name.
        val_rows: Rows of the validation split.
    """
    rows = []
    for point in sorted(points, key=_place):
        sound = _sound(runs, point)
        row: dict[str, Any] = {
            "name": point.name,
            "axes": list(point.axes),
            "training_rows": point.sizes["data"],
            "parameters": point.sizes["parameters"],
            "batch_size": point.sizes["batch"],
            "runs": [run.run_id for run in sound],
            "diverged": [run.run_id for run in runs.get(point.name, ()) if run.diverged],
        }
        if sound:
            errors = [run.val_error for run in sound]
            losses = [run.val_loss for run in sound]
            speeds = _speeds(sound)
            row |= {
                "steps": sound[0].steps,
                "val_error": float(np.mean(errors)),
                "val_error_deviation": _deviation(errors),
                "val_error_binomial": binomial_deviation(float(np.mean(errors)), val_rows),
                "val_errors": errors,
                "val_loss": float(np.mean(losses)),
                "val_loss_deviation": _deviation(losses),
                "val_losses": losses,
                "images_per_second": float(np.mean(speeds)) if speeds else None,
            }
        rows.append(row)
    return rows


def _place(point: Point) -> tuple[int, int]:
    axis = AXES[0] if point.name == BASE else point.axes[0]
    return AXES.index(axis), point.sizes[axis]


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
