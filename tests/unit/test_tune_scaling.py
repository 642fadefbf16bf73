"""What scaling buys: curves against synthetic truth, the plan of points, one point, the picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling_coverage import (
    BATCH_NOW,
    BATCHES,
    LARGEST,
    SHARES,
    coverage,
    parabola,
    power_law,
)
from rayloop.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
)
from rayloop.data.versions import DatasetVersion, read_split
from rayloop.errors import ConfigError, Corrupt, Diverged
from rayloop.storage import Storage
from rayloop.train.start import order_of
from rayloop.tune.scaling import BASE, claim_scaling, doublings, plan_points, point_rows
from rayloop.tune.scaling_fit import (
    NO_EFFECT,
    Measured,
    RowNoise,
    binomial_deviation,
    forecast,
    row_noise,
)
from rayloop.tune.scaling_picture import draw_scaling, scaling_lines
from rayloop.tune.scaling_point import Run, load_point, train_point
from tests.datasets import write_dataset

SIZES = [share * LARGEST for share in SHARES]
REPEATS = 200
ALLOWED = 3 * (0.9 * 0.1 / REPEATS) ** 0.5
"""Three standard deviations of a share of 90% counted over the repeats."""


@pytest.mark.parametrize(("a", "b", "c"), [(0.05, 0.03, 0.6), (0.0, 0.08, 0.3), (0.085, 0.01, 1.0)])
def test_nine_of_ten_intervals_hold_the_truth(a, b, c):
    told = coverage(power_law(a, b, c), SIZES, LARGEST, "power", REPEATS, rows=3000)
    assert abs(told["error"] - 0.9) <= ALLOWED
    assert abs(told["change"] - 0.9) <= ALLOWED


def test_three_points_are_not_surer_than_they_may_be():
    told = coverage(power_law(0.05, 0.03, 0.6), SIZES[1:], LARGEST, "power", REPEATS, rows=3000)
    assert told["error"] >= 0.9 - ALLOWED
    assert told["change"] >= 0.9 - ALLOWED


def test_flat_data_has_no_effect():
    told = coverage(power_law(0.03, 0.0, 1.0), SIZES, LARGEST, "power", REPEATS, rows=180, luck=0.1)
    assert told["no_effect"] >= 0.9
    assert told["error"] >= 0.9 - ALLOWED


@pytest.mark.parametrize("bend", [0.0, 0.01])
def test_a_batch_size_has_an_optimum_or_nothing_to_say(bend):
    truth = parabola(0.05, bend, bend)
    told = coverage(truth, BATCHES, BATCH_NOW, "parabola", REPEATS, rows=3000)
    assert told["error"] >= 0.9 - ALLOWED
    assert told["no_effect"] < 0.1 if bend else told["no_effect"] > 0.9


@pytest.mark.parametrize(
    ("a", "b", "c", "model"),
    [
        (0.05, 0.03, 0.6, "power law with asymptote"),
        (0.0, 0.08, 0.3, "power law"),
        (0.04, 0.0, 1.0, "constant"),
    ],
)
def test_without_noise_the_truth_is_recovered(a, b, c, model):
    truth = power_law(a, b, c)
    told = forecast(
        Measured(x=SIZES, values=[[truth(n)] * 3 for n in SIZES]), LARGEST, 2 * LARGEST, 0
    )
    assert told is not None and told.model == model
    assert not told.misfit
    assert told.predicted == pytest.approx(truth(2 * LARGEST), rel=1e-3)
    assert told.high - told.low < 1e-3
    named = {"a": a, "b": b * LARGEST**c, "c": c}
    for name, value in told.coefficients.items():
        assert value == pytest.approx(named[name], rel=0.03), name


def test_a_curve_no_form_passes_is_said_and_its_interval_is_wider():
    falls = [[0.50, 0.51, 0.49], [0.49, 0.5, 0.48], [0.48, 0.49, 0.47], [0.1, 0.11, 0.09]]
    told = forecast(Measured(x=SIZES, values=falls), LARGEST, 2 * LARGEST, 0)
    assert told is not None and told.misfit
    assert told.high - told.low > 0.1


def test_few_points_get_no_curve_and_a_perfect_split_no_certainty():
    two = Measured(x=SIZES[:2], values=[[0.1, 0.2]] * 2)
    assert forecast(two, SIZES[1], 2 * SIZES[1], 0) is None
    lone = Measured(x=SIZES, values=[[0.1]] * 4)
    assert forecast(lone, LARGEST, 2 * LARGEST, 0) is None
    none_wrong = [np.zeros((3, 100), bool)] * 4
    values, noise = [[0.0] * 3] * 4, row_noise(none_wrong, is_share=True)
    told = forecast(Measured(x=SIZES, values=values, noise=noise), LARGEST, 2 * LARGEST, 0)
    assert told is not None
    assert told.now == 0
    assert told.effect == NO_EFFECT
    assert 0.005 < told.high < 0.1  # 100 rows without a mistake do not rule out a percent


def test_what_all_points_share_does_not_bend_the_curve():
    values = [[0.11, 0.12, 0.10], [0.08, 0.07, 0.09], [0.06, 0.05, 0.055], [0.04, 0.05, 0.045]]
    sd, least = 0.01, np.zeros(4)
    shared = RowNoise(np.full((4, 4), sd**2), least)
    apart = RowNoise(np.eye(4) * sd**2, least)
    of = {
        name: forecast(Measured(x=SIZES, values=values, noise=noise), LARGEST, 2 * LARGEST, 0)
        for name, noise in (("shared", shared), ("apart", apart), ("none", None))
    }
    doubt = {name: told.high - told.low for name, told in of.items() if told}
    changes = {name: told.change_high - told.change_low for name, told in of.items() if told}
    assert doubt["none"] < doubt["shared"]
    assert changes["shared"] < changes["apart"]


def test_the_rows_make_a_floor_of_the_doubt():
    chance = np.random.default_rng(0)
    always = np.tile(chance.random(200) < 0.1, (3, 1))  # every seed, every point: the same rows
    noise = row_noise([always] * 3, is_share=True)
    expected = binomial_deviation(float(always.mean()), 200) ** 2
    assert noise.covariance == pytest.approx(np.full((3, 3), expected), rel=0.02)
    assert noise.least_seed_variance == pytest.approx(np.zeros(3))
    free = chance.random((3, 200)) < 0.1  # rows have nothing in common: all doubt is the seeds'
    free_noise = row_noise([free] * 3, is_share=False)
    assert free_noise.covariance[0, 0] < 0.3 * 0.09 / 200
    assert free_noise.least_seed_variance[0] == pytest.approx(0.09 / 200, rel=0.3)


CONFIG = Config(
    run_id="much",
    data=DataConfig(name="thirds"),
    model=ModelConfig(widths=(4, 8)),
    train=TrainConfig(
        epochs=2,
        global_batch_size=12,
        norm_group_rows=6,
        num_workers=2,
        precision="fp32",
        floor_epochs=0,
        augment=AugmentConfig(translate_px=1),
    ),
    scaling=ScalingConfig(seeds=2, batch_factors=(0.5, 1.0, 2.0)),
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def dataset(storage: Storage) -> DatasetVersion:
    return write_dataset(storage)


def scaled(**changes) -> Config:
    return replace(CONFIG, scaling=replace(CONFIG.scaling, **changes))


def test_the_plan_changes_one_thing_at_a_time_and_shares_the_base(dataset):
    points = plan_points(CONFIG, dataset)
    named = {point.name: point for point in points}
    assert set(named) == {
        BASE, "data-0.125", "data-0.25", "data-0.5", "width-0.5", "width-1.41", "batch-0.5",
        "batch-2",
    }  # fmt: skip
    assert named[BASE].axes == ("data", "parameters", "batch")
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    base = named[BASE]
    for point in points:
        different = [axis for axis in point.sizes if point.sizes[axis] != base.sizes[axis]]
        assert different == ([] if point is base else list(point.axes))
        assert point.config.train.num_workers == 1
    runs = base.runs()
    assert [run.run_id for run in runs] == ["much-base-s0", "much-base-s1"]
    assert [run.train.seed for run in runs] == [0, 1]


def test_widths_stay_multiples_of_eight(dataset):
    config = replace(CONFIG, model=ModelConfig(widths=(16, 48, 64)))
    widths = {point.name: point.config.model.widths for point in plan_points(config, dataset)}
    assert widths["width-0.5"] == (8, 24, 32)
    assert widths["width-0.71"] == (8, 32, 48)
    assert widths["width-1.41"] == (24, 64, 88)


def test_axes_can_be_left_out(dataset):
    points = plan_points(scaled(width_factors=(), batch_factors=()), dataset)
    assert {axis for point in points for axis in point.axes} == {"data"}


def test_less_data_can_keep_the_steps(dataset):
    for keeps, halves in (("epochs", 0.5), ("steps", 1.0)):
        named = {point.name: point for point in plan_points(scaled(data_keeps=keeps), dataset)}
        steps = {
            name: order_of(point.config.train, dataset).num_steps(point.config.train.epochs)
            for name, point in named.items()
        }
        assert steps["data-0.5"] == pytest.approx(halves * steps[BASE], abs=0.5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (scaled(data_shares=(0.5, 1.0)), r"data_shares=\(0.5, 1.0\) makes 2 different points"),
        (scaled(width_factors=(1.0, 1.01, 0.99)), "width_factors=.* makes 1 different point of"),
        (scaled(data_shares=(0.01, 1.0)), "data-0.01 has 1 of the 110 training rows.*from 0.109"),
        (scaled(batch_factors=(1, 2, 16)), "batch-16 has 110 of.*smaller --scaling.batch_factors"),
        (scaled(batch_factors=(0.75, 1, 2)), "0.75, which makes a step of 9 rows.*multiple of 6"),
        (
            scaled(data_shares=(), width_factors=(), batch_factors=()),
            "scaling varies nothing: --scaling.data_shares, .* are all empty",
        ),
        (replace(CONFIG, model=ModelConfig(name="linear")), "model.name='linear' has no widths"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_answer_is_refused(dataset, config, told):
    with pytest.raises(ConfigError, match=told):
        plan_points(config, dataset)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data_shares": (0.0, 0.5)}, r"scaling.data_shares=\(0.0, 0.5\)"),
        ({"data_shares": (0.5, 1.5)}, "numbers from 1e-06 to 1"),
        ({"batch_factors": (-1.0,)}, "scaling.batch_factors"),
        ({"seeds": 1}, "scaling.seeds=1"),
    ],
)
def test_settings_are_checked_when_they_are_made(values, told):
    with pytest.raises(ConfigError, match=told):
        ScalingConfig(**values)


def splits_of(storage: Storage, dataset: DatasetVersion):
    return {name: read_split(storage, dataset, name) for name in ("train", "val")}


def test_a_point_is_trained_once_and_every_row_is_scored(storage, dataset, monkeypatch):
    (config, *_) = plan_points(CONFIG, dataset)[0].runs()
    assert load_point(config, storage) is None
    run = train_point(config, storage, dataset, splits_of(storage, dataset))
    assert run.val_error == pytest.approx(run.wrong.mean())
    assert run.val_loss == pytest.approx(run.losses.mean(), rel=1e-4)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("rayloop.tune.scaling_point.train_alone", refuse)
    again = load_point(config, storage)
    assert again is not None
    assert (again.wrong == run.wrong).all()
    assert (again.val_error, again.val_loss, again.steps) == (
        run.val_error, run.val_loss, run.steps
    )  # fmt: skip
    other = replace(config, train=replace(config.train, learning_rate=0.5))
    assert load_point(other, storage) is None
    storage.write(f"runs/{config.run_id}/val_rows.npz", b"PK broken")
    with pytest.raises(Corrupt, match="val_rows.npz cannot be read"):
        load_point(config, storage)


def test_a_point_that_diverges_is_a_result(storage, dataset, monkeypatch):
    (config, *_) = plan_points(CONFIG, dataset)[0].runs()

    def diverge(*_, **__):
        raise Diverged("The training loss became nan at step 3.")

    monkeypatch.setattr("rayloop.tune.scaling_point.train_alone", diverge)
    run = train_point(config, storage, dataset, splits_of(storage, dataset))
    assert run.diverged == "The training loss became nan at step 3."
    again = load_point(config, storage)
    assert again is not None
    assert again.diverged == run.diverged
    assert load_point(replace(config, train=replace(config.train, epochs=3)), storage) is None


def results_of(points, diverged=()):
    """Runs whose errors fall with data and parameters and rise with the batch."""
    chance = np.random.default_rng(0)
    found = {}
    for point in points:
        rows, size, batch = (point.sizes[axis] for axis in ("data", "parameters", "batch"))
        share = 0.05 + 0.1 * (rows / 110) ** -0.4 * (size / 1440) ** -0.2
        share += 0.04 * np.log2(batch / 12)
        found[point.name] = [
            Run(
                run_id=f"much-{point.name}-s{index}", diverged="at step 1",
                wrong=np.empty(0, bool), losses=np.empty(0, "f4"),
            )
            if (point.name, index) in diverged
            else Run(
                run_id=f"much-{point.name}-s{index}", val_error=float(wrong.mean()),
                val_loss=float(wrong.mean() * 3), images_per_second=1000.0 * batch**0.3 + index,
                steps=7, wrong=wrong, losses=(wrong * 3).astype("f4"),
            )
            for index, wrong in enumerate(chance.random((3, 2000)) < share)
        ]  # fmt: skip
    return found


def test_every_axis_is_told_from_its_points(dataset):
    points = plan_points(CONFIG, dataset)
    found = doublings(points, results_of(points), seed=0)
    assert list(found) == ["data", "parameters", "batch"]
    assert (found["data"].val_error.x_now, found["data"].val_error.x_then) == (110, 220)
    assert found["parameters"].val_error.x_then == 2 * 2332
    assert (found["batch"].val_error.x_now, found["batch"].val_error.x_then) == (12, 24)
    assert found["data"].val_error.effect == "lower"
    assert found["batch"].val_error.effect == "higher"
    speed = found["batch"].images_per_second
    assert speed is not None
    assert speed.change == pytest.approx(2**0.3, rel=0.01)
    tried = found["data"].held_out
    assert tried is not None
    assert (tried.x_now, tried.x_then) == (55, 110)
    assert tried.low <= found["data"].val_error.now <= tried.high
    assert found["data"].plain()["held_out"]["measured"] == round(found["data"].val_error.now, 6)
    assert found["parameters"].held_out is None  # two of its three points are no curve
    told = found["batch"].plain()
    assert told["metric"] == "val_error"
    assert {"now", "predicted", "low", "high", "model", "effect"} <= set(told)
    assert {"val_loss", "images_per_second"} <= set(told)


def test_diverged_runs_are_counted_and_left_out(dataset):
    points = plan_points(CONFIG, dataset)
    gone = {("data-0.125", 0), *((name, i) for name in ("batch-2",) for i in range(3))}
    runs = results_of(points, gone)
    found = doublings(points, runs, seed=0)
    assert set(found) == {"data", "parameters"}  # two batch sizes are left
    rows = {row["name"]: row for row in point_rows(points, runs, 2000)}
    assert rows["data-0.125"]["diverged"] == ["much-data-0.125-s0"]
    assert len(rows["data-0.125"]["val_errors"]) == 2
    assert "val_error" not in rows["batch-2"]
    assert any("diverged" in line for line in scaling_lines(list(rows.values()), found, ["batch"]))


def test_the_same_results_tell_the_same(dataset):
    points = plan_points(CONFIG, dataset)
    assert doublings(points, results_of(points), 5) == doublings(points, results_of(points), 5)


@pytest.mark.parametrize("known", [0, 2, 8])
def test_the_picture_can_be_drawn_at_any_time(dataset, known):
    points = plan_points(CONFIG, dataset)
    runs = dict(list(results_of(points).items())[:known])
    rows, found = point_rows(points, runs, 2000), doublings(points, runs, 0)
    png = draw_scaling(rows, found, ("data", "parameters", "batch"), "much", 2000)
    assert png.startswith(b"\x89PNG")
    lines = scaling_lines(rows, found, ("data", "parameters", "batch"))
    assert len(lines) >= len(points) + 4


def test_a_run_id_stands_for_what_decides_the_results(storage, dataset):
    claim_scaling(CONFIG, dataset, storage)
    claim_scaling(replace(CONFIG, train=replace(CONFIG.train, cpus_per_worker=2)), dataset, storage)
    with pytest.raises(ConfigError, match=r"scaling.seeds was 2, now 3. Use the same settings"):
        claim_scaling(scaled(seeds=3), dataset, storage)
    with pytest.raises(ConfigError, match=r"train.epochs was 2, now 5"):
        claim_scaling(replace(CONFIG, train=replace(CONFIG.train, epochs=5)), dataset, storage)
    storage.write_json("runs/trained/config.json", {})
    with pytest.raises(ConfigError, match="'trained' exists and is no scaling run"):
        claim_scaling(replace(CONFIG, run_id="trained"), dataset, storage)
