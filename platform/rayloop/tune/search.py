"""A space and the trials so far -> the next configuration to try.

Each suggestion is a function of the seed, its number and the trials' records, and of nothing that
a process remembers: a sweep that was killed goes on as it would have.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from rayloop.config import TuneConfig
from rayloop.tune.front import Best, pareto_front
from rayloop.tune.objective import DIRECTIONS, goodness
from rayloop.tune.population import next_member, num_trials_of_population
from rayloop.tune.space import Assignment, Choice, Dimension, Range, Space
from rayloop.tune.suggestion import Suggestion, Wait, generator
from rayloop.tune.trial import Trial


def suggest(
    config: TuneConfig, space: Space, epochs: float, trials: Sequence[Trial]
) -> Suggestion | Wait | None:
    """What to try next.

    Args:
        config: The tune section.
        space: What may be tried.
        epochs: Epochs of a whole run.
        trials: All trials so far; the next one's number is how many they are.

    Returns:
        A suggestion; `Wait` where running trials must end before there is one; None where all
        has been tried.
    """
    number = len(trials)
    if number >= num_trials(config, space, epochs):
        return None
    if config.search == "pbt":
        return next_member(config, space, epochs, trials)
    if config.search == "grid":
        return Suggestion(space.grid()[number])
    if config.search == "tpe" and _num_known(trials) >= config.startup_trials:
        return Suggestion(_estimate(config, space, trials))
    return Suggestion(space.sample(generator(config.seed, number)))


def num_trials(config: TuneConfig, space: Space, epochs: float) -> int:
    """How many trials a whole sweep has."""
    if config.search == "grid":
        return len(space.grid())
    if config.search == "pbt":
        return num_trials_of_population(config, epochs)
    return config.trials


def _num_known(trials: Sequence[Trial]) -> int:
    return sum(trial.status in ("finished", "stopped") for trial in trials)


def _estimate(config: TuneConfig, space: Space, trials: Sequence[Trial]) -> Assignment:
    """Where Optuna's tree-structured Parzen estimator expects most.

    The study is made anew from the records. A trial that was stopped early counts as Optuna's
    pruned one: below those that were finished, and the better the further it came. Trials that
    run count as bad ones, so that the next is looked for elsewhere.
    """
    optuna = _optuna()
    seed = int(generator(config.seed, len(trials)).integers(2**32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental arguments
        study = optuna.create_study(
            directions=[DIRECTIONS[name] for name in config.objectives],
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=True, group=True, constant_liar=True
            ),
        )
        study.add_trials([_frozen(config, space, trial) for trial in trials])
        asked = study.ask()
        assignment: Assignment = {}
        for dimension in space.dimensions:
            if space.is_active(dimension, assignment):
                assignment[dimension.field] = _ask(asked, dimension)
    return assignment


@cache
def _optuna() -> Any:
    """Optuna, quiet; imported on first use, since that takes half a second."""
    import optuna  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _frozen(config: TuneConfig, space: Space, trial: Trial) -> Any:
    """A trial as Optuna knows it."""
    optuna, names = _optuna(), config.objectives
    states = optuna.trial.TrialState
    state = {
        "finished": states.COMPLETE, "stopped": states.PRUNED, "running": states.RUNNING,
        "failed": states.FAIL,
    }[trial.status]  # fmt: skip
    params, distributions = {}, {}
    for dimension in space.dimensions:
        if dimension.field in trial.assignment and space.is_active(dimension, trial.assignment):
            name = _name(dimension)
            distributions[name] = _distribution(dimension.domain)
            params[name] = _to_optuna(dimension.domain, trial.assignment[dimension.field])
    is_single = len(names) == 1
    # Optuna ranks by this number how far a pruned trial came; batches may differ, epochs do not.
    curve = {round(1000 * r["epoch"]): r[names[0]] for r in trial.records} if is_single else {}
    done = trial.status == "finished"
    values = [trial.figures[name] for name in names] if done else None
    return optuna.trial.create_trial(
        state=state, values=values, params=params, distributions=distributions,
        intermediate_values=curve,
    )  # fmt: skip


def _name(dimension: Dimension) -> str:
    """Unique also where a field is declared twice, under conditions."""
    return f"{dimension.field} if {dimension.condition}" if dimension.condition else dimension.field


def _distribution(domain: Range | Choice) -> Any:
    kinds = _optuna().distributions
    if isinstance(domain, Choice):
        return kinds.CategoricalDistribution(range(len(domain.values)))
    if domain.is_integer:
        return kinds.IntDistribution(int(domain.low), int(domain.high), log=domain.is_log)
    return kinds.FloatDistribution(domain.low, domain.high, log=domain.is_log)


def _to_optuna(domain: Range | Choice, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value


def _ask(asked: Any, dimension: Dimension) -> Any:
    name, domain = _name(dimension), dimension.domain
    if isinstance(domain, Choice):
        return domain.values[asked.suggest_categorical(name, range(len(domain.values)))]
    if domain.is_integer:
        return asked.suggest_int(name, int(domain.low), int(domain.high), log=domain.is_log)
    return asked.suggest_float(name, domain.low, domain.high, log=domain.is_log)


def best(config: TuneConfig, trials: Sequence[Trial]) -> Trial | None:
    """The finished trial that is best in the first objective; of equals the earliest.

    With pbt only those of the last turn are whole runs.
    """
    name = config.objectives[0]
    whole = [trial for trial in trials if trial.status == "finished" and not trial.stop_epochs]
    return max(
        whole, key=lambda trial: (goodness(name, trial.figures), -trial.number), default=None
    )


def front(config: TuneConfig, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one beats in all objectives."""
    whole = [trial for trial in trials if trial.status == "finished" and not trial.stop_epochs]
    points = [[trial.figures[name] for name in config.objectives] for trial in whole]
    best: list[Best] = [
        "highest" if DIRECTIONS[name] == "maximize" else "lowest" for name in config.objectives
    ]
    return [whole[at] for at in pareto_front(points, best)]
