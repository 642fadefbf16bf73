"""A sweep: what it tries, remembers and refuses, also when it was cut off anywhere."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloop.config import Config
from rayloop.errors import ConfigError, Corrupt, WorkError
from rayloop.tune.population import perturbed
from rayloop.tune.search import front, num_trials
from rayloop.tune.suggestion import Wait, generator
from rayloop.tune.trial import Trial, lineage, load_trials
from tests.unit.tune_cases import accuracy, config_of, open_sweep, record, run, train, without_times

CASES: dict[str, dict[str, Any]] = {
    "random": {"search": "random", "trials": 9},
    "grid": {"search": "grid", "stopping": "median"},
    "tpe": {"search": "tpe", "trials": 12, "startup_trials": 3},
    "pbt": {"search": "pbt", "trials": 4, "perturb_epochs": 3},
}
GRID = ("train.learning_rate=log(0.001, 1, 4)", "train.label_smoothing=linear(0, 0.4, 2)")


def case(name: str, **changes: Any) -> Config:
    """A sweep's settings by the name of its search."""
    given_space = {"space": GRID} if name == "grid" else {}
    return config_of(**given_space, **{**CASES[name], **changes})


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_ends_with_every_trial_over_and_a_best_one(tmp_path: Path, name: str) -> None:
    sweep = open_sweep(tmp_path, case(name))
    trials = run(sweep)
    assert sweep.next() is None and sweep.is_complete
    assert len(trials) == sweep.num_trials == {"random": 9, "grid": 8, "tpe": 12, "pbt": 12}[name]
    best = sweep.best()
    assert best is not None and best.status == "finished" and not best.stop_epochs
    whole = [t for t in trials if t.status == "finished" and not t.stop_epochs]
    assert best.figures["val_accuracy"] == max(t.figures["val_accuracy"] for t in whole)
    assert [t.run_id for t in trials] == [f"s-{t.number:04d}" for t in trials]
    assert sweep.budget_epochs == sum(trial.epochs for trial in trials)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_sweep_that_was_killed_goes_on_as_one_that_was_not(
    tmp_path: Path, name: str, cut: int
) -> None:
    """Killed in the midst of a trial; the next process finds the records and nothing else."""
    whole = run(open_sweep(tmp_path / "whole", case(name)))
    first = open_sweep(tmp_path / "cut", case(name))
    run(first, up_to=cut - 1)
    trial = first.next()
    if isinstance(trial, Trial):
        train(first, trial, stop_at=trial.start_epoch + 1)
    begun: list[int] = []
    second = open_sweep(tmp_path / "cut", case(name))
    over = {t.number for t in second.trials if t.is_over}
    trials = run(second, told=lambda t: begun.append(t.number))
    assert without_times(trials) == without_times(whole)
    assert not over & set(begun)


@pytest.mark.parametrize("name", CASES)
def test_another_seed_tries_other_configurations(tmp_path: Path, name: str) -> None:
    def assignments(folder: str, seed: int) -> list[dict[str, Any]]:
        return [t.assignment for t in run(open_sweep(tmp_path / folder, case(name, seed=seed)))]

    assert assignments("a", 1) == assignments("b", 1)
    assert (assignments("a", 1) == assignments("c", 2)) == (name == "grid")


def test_tpe_learns_and_its_startup_is_that_of_random(tmp_path: Path) -> None:
    near_tpe, near_random = [], []
    for seed in range(4):
        tpe = run(open_sweep(tmp_path / f"t{seed}", case("tpe", trials=24, seed=seed,
                                                         startup_trials=6)))  # fmt: skip
        random = run(open_sweep(tmp_path / f"r{seed}", case("random", trials=24, seed=seed)))
        assert [t.assignment for t in tpe[:6]] == [t.assignment for t in random[:6]]
        near_tpe += [accuracy(t.assignment, 9) for t in tpe[12:]]
        near_random += [accuracy(t.assignment, 9) for t in random[12:]]
    assert sum(near_tpe) / len(near_tpe) > sum(near_random) / len(near_random) + 0.1


def test_asha_spends_little_on_the_bad_ones(tmp_path: Path) -> None:
    config = case("random", trials=27)
    trials = run(open_sweep(tmp_path, config))
    finished = [t for t in trials if t.status == "finished"]
    assert 1 <= len(finished) <= 9
    assert sum(t.epochs for t in trials) < 0.5 * 27 * 9
    ideal = max(accuracy(t.assignment, 9) for t in trials)
    best = max(t.figures["val_accuracy"] for t in finished)
    assert best >= ideal - 0.1


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=30), st.integers(0, 3))
def test_trials_side_by_side_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int], seed: int
) -> None:
    """Whatever trial reports next, nothing is lost, nothing is told twice, all ends."""
    sweep = open_sweep(tmp_path_factory.mktemp("s"), case("random", seed=seed))
    running: dict[int, int] = {}
    while True:
        while len(running) < 3 and isinstance(trial := sweep.next(), Trial):
            running[trial.number] = 0
        if not running:
            break
        number = sorted(running)[(turns.pop() if turns else 0) % len(running)]
        epoch = running[number] = running[number] + 1
        value = accuracy(sweep.trial(number).assignment, epoch)
        stop = sweep.report(number, record(epoch, value))
        if epoch == 9:
            assert not stop
            sweep.finish(number)
        if stop or epoch == 9:
            del running[number]
    assert sweep.is_complete
    for trial in sweep.trials:
        epochs = [each["epoch"] for each in trial.records]
        assert epochs == [float(e) for e in range(1, len(epochs) + 1)]
        assert (trial.status == "finished") == (len(epochs) == 9)
    assert load_trials(sweep.storage, "s") == sweep.trials


def test_a_record_that_is_known_changes_nothing(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("random"))
    trial = sweep.next()
    assert isinstance(trial, Trial)
    sweep.report(0, record(1, 0.5))
    sweep.report(0, record(1, 0.9))
    sweep.report(0, record(2, 0.6))
    sweep.report(0, record(1, 0.1))
    assert [each["val_accuracy"] for each in sweep.trial(0).records] == [0.5, 0.6]


def test_a_failed_trial_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("tpe"))
    trial = sweep.next()
    assert isinstance(trial, Trial)
    sweep.retry(0, "it broke")
    assert sweep.trial(0).attempts == 2 and not sweep.trial(0).is_over
    sweep.fail(0, "it broke again")
    sweep.finish(0)  # comes too late
    assert sweep.trial(0).status == "failed"
    trials = run(sweep)
    assert len(trials) == 12 and trials[0].error == "it broke again"
    assert sum(t.status == "failed" for t in trials) == 1


def test_a_sweep_of_failures_ends(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("tpe"))
    while isinstance(trial := sweep.next(), Trial):
        sweep.fail(trial.number, "no")
    assert sweep.best() is None and len(sweep.trials) == 12


def test_a_finished_sweep_can_be_made_longer(tmp_path: Path) -> None:
    first = run(open_sweep(tmp_path, case("tpe")))
    longer = open_sweep(tmp_path, case("tpe", trials=15))
    assert not longer.is_complete
    assert without_times(run(longer)[:12]) == without_times(first)
    with pytest.raises(ConfigError, match="tune.trials was 15, now 12"):
        open_sweep(tmp_path, case("tpe"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": ("train.learning_rate=log(0.001, 0.5)",)}, "tune.space was"),
        ({"search": "random"}, "tune.search was tpe, now random"),
        ({"seed": 5}, "tune.seed was 0, now 5"),
    ],
)
def test_the_run_id_of_another_space_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    open_sweep(tmp_path, case("tpe"))
    with pytest.raises(ConfigError, match=f"Sweep 's' exists with other settings.*{told}"):
        open_sweep(tmp_path, case("tpe", **changes))


def test_other_means_do_not_make_another_sweep(tmp_path: Path) -> None:
    open_sweep(tmp_path, case("tpe"))
    open_sweep(tmp_path, case("tpe", max_concurrent=3, max_failures=9, trainable="ddp"))


def test_the_run_id_of_other_data_or_a_single_run_is_refused(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("tpe"))
    settings_file = sweep.storage.read_json("runs/s/sweep.json")
    sweep.storage.write_json("runs/s/sweep.json", {**settings_file, "dataset_digest": "other"})
    with pytest.raises(ConfigError, match="dataset_digest was other"):
        open_sweep(tmp_path, case("tpe"))
    sweep.storage.write_json("runs/one/config.json", {})
    with pytest.raises(ConfigError, match="'one' exists and is a single run"):
        open_sweep(tmp_path, replace(case("tpe"), run_id="one"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_fails_its_trial_alone(tmp_path: Path, value: float) -> None:
    """JSON has no such numbers: written down it would stop the sweep at every start."""
    sweep = open_sweep(tmp_path, case("tpe"))
    sweep.next()
    assert sweep.report(0, {**record(1, 0.5), "val_loss": value})
    assert sweep.trial(0).status == "failed"
    assert sweep.trial(0).error == f"val_loss is {value} at epoch 1"
    assert len(run(sweep)) == 12


@pytest.mark.parametrize("name", ["random", "tpe", "pbt"])
def test_a_record_that_was_removed_is_tried_again(tmp_path: Path, name: str) -> None:
    whole = run(open_sweep(tmp_path, case(name)))
    (tmp_path / "runs/s/trials/0002.json").unlink()
    sweep = open_sweep(tmp_path, case(name))
    assert not sweep.is_complete
    begun: list[int] = []
    trials = run(sweep, told=lambda trial: begun.append(trial.number))
    assert begun == [2]
    assert trials[2].assignment == whole[2].assignment
    assert sweep.is_complete and len(trials) == len(whole)


def test_values_that_contradict_each_other_fail_their_trial_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = open_sweep(tmp_path, case("random"))
    settings_of = sweep.settings_of

    def refuse_the_second(trial: Trial) -> Config:
        if trial.number == 1:
            raise ConfigError("no such pair")
        return settings_of(trial)

    monkeypatch.setattr(sweep, "settings_of", refuse_the_second)
    trials = run(sweep)
    assert [t.status == "failed" for t in trials] == [False, True] + [False] * 7
    assert trials[1].error == "no such pair"


def test_a_crash_that_is_told_after_the_end_changes_nothing(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("random"))
    [trial] = run(sweep, up_to=1)
    sweep.retry(0, "too late")
    assert sweep.trial(0) == trial


def test_a_trial_that_is_queued_again_comes_first(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("random"))
    sweep.next()
    sweep.requeue(0)
    again = sweep.next()
    assert isinstance(again, Trial) and (again.number, again.attempts) == (0, 2)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("random"))
    run(sweep, up_to=2)
    sweep.storage.write("runs/s/trials/0001.json", b"{}")
    with pytest.raises(Corrupt, match=r"0001.json is not a trial.*remove it, and"):
        open_sweep(tmp_path, case("random"))


def test_several_objectives_leave_a_front(tmp_path: Path) -> None:
    config = config_of(search="tpe", trials=12, startup_trials=4,
                       objectives=("val_accuracy", "size_bytes"))  # fmt: skip
    sweep = open_sweep(tmp_path, config)
    while isinstance(trial := sweep.next(), Trial):
        sweep.cost(trial.number, {"size_bytes": 1e4 * trial.assignment["train.learning_rate"]})
        train(sweep, trial)
    kept = front(config.tune, sweep.trials)
    assert 1 <= len(kept) < 12
    for one in kept:
        for other in sweep.trials:
            assert not (
                other.figures["val_accuracy"] > one.figures["val_accuracy"]
                and other.figures["size_bytes"] < one.figures["size_bytes"]
            )
    assert sweep.best() in kept


@pytest.mark.parametrize(
    ("objectives", "told"),
    [
        (("val_acurracy",), "Did you mean val_accuracy?"),
        (("f1",), "which no trial reports; there are val_accuracy"),
        (("size_bytes",), "the first one must be of val_accuracy"),
    ],
)
def test_an_objective_that_is_never_reported_is_refused(
    tmp_path: Path, objectives: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        open_sweep(tmp_path, case("tpe", objectives=objectives))
    assert told in str(error.value)
    assert not (tmp_path / "runs").exists()


# --- populations


def test_a_population_copies_its_best(tmp_path: Path) -> None:
    trials = run(open_sweep(tmp_path, case("pbt", trials=8)))
    turns = [trials[at : at + 8] for at in range(0, 24, 8)]
    for before, after in pairwise(turns):
        ranked = sorted(before, key=lambda t: -t.figures["val_accuracy"])
        best, worst = ranked[:2], ranked[-2:]
        for mine, old in zip(after, before, strict=True):
            parent = trials[mine.parent]
            assert mine.start_epoch == parent.records[-1]["epoch"]
            if old in worst:
                assert parent in best
            else:
                assert parent == old and mine.assignment == old.assignment
    assert all(t.status == "finished" for t in trials)
    assert [t.stop_epochs for t in trials] == [3.0] * 8 + [6.0] * 8 + [0.0] * 8
    assert num_trials(case("pbt").tune, open_sweep(tmp_path / "b", case("pbt")).space, 10) == 16
    last = max(turns[-1], key=lambda t: t.figures["val_accuracy"])
    line = lineage(trials, last)
    assert len(line) == 3 and line[-1] == last and line[0].parent == -1
    assert sum(t.epochs for t in line) == 9


def test_a_turn_begins_when_the_one_before_is_over(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("pbt"))
    first = [sweep.next() for _ in range(4)]
    assert all(isinstance(trial, Trial) for trial in first)
    assert sweep.next() is Wait.FOR_TRIALS
    for trial in first[:3]:
        assert isinstance(trial, Trial)
        train(sweep, trial)
    assert sweep.next() is Wait.FOR_TRIALS
    sweep.fail(3, "no")
    after = [sweep.next() for _ in range(4)]
    assert isinstance(after[3], Trial) and after[3].parent in (0, 1, 2)


def test_a_turn_that_fails_as_a_whole_ends_the_sweep(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("pbt"))
    for number in range(4):
        sweep.next()
        sweep.fail(number, "no disk")
    with pytest.raises(WorkError, match="All 4 members.*no disk"):
        sweep.next()


def test_a_perturbed_setting_moves_and_stays_in_its_domain(tmp_path: Path) -> None:
    texts = ("train.augment.translate_px=linear(0, 3)", "train.augment.flip=choice(true, false)",
             "train.clip_norm=linear(1, 2) if train.augment.flip == true",
             "train.clip_norm=linear(3, 4) if train.augment.flip == false")  # fmt: skip
    space = open_sweep(tmp_path, case("pbt", space=texts)).space
    for seed in range(60):
        old = space.sample(generator(seed, 0))
        new = perturbed(space, old, generator(seed, 1))
        assert set(new) == set(old)
        low = 1 if new["train.augment.flip"] else 3
        assert low <= new["train.clip_norm"] <= low + 1
        assert 0 <= new["train.augment.translate_px"] <= 3
    moved = [perturbed(space, {**old, "train.augment.translate_px": 1}, generator(s, 2))
             ["train.augment.translate_px"] for s in range(40)]  # fmt: skip
    assert set(moved) >= {0, 2}


def test_a_population_stays_within_the_space(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, case("pbt", trials=8, perturb_epochs=1))
    for trial in run(sweep):
        assert 0.001 <= trial.assignment["train.learning_rate"] <= 1
        assert 0 <= trial.assignment["train.label_smoothing"] <= 0.4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": ("model.widths=choice((8, 8), (8, 16))",)}, "which model.widths cannot"),
        ({"trials": 3}, "too small a population"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        open_sweep(tmp_path, case("pbt", **changes))
