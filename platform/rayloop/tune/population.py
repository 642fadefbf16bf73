"""Population-based training in turns: a turn is a trial that goes on with an earlier one's model.

After every turn the worst members give up their model and settings for those of one of the best,
and change the settings a little (Jaderberg et al., "Population Based Training of Neural Networks",
2017). A turn begins when all members have ended the one before: so the population's history is a
function of its records, and a killed sweep goes on exactly.
"""

import math
from collections.abc import Sequence

import numpy as np

from rayloop.config import TuneConfig
from rayloop.errors import ConfigError, WorkError
from rayloop.tune.objective import goodness
from rayloop.tune.space import Assignment, Choice, Range, Space, draw
from rayloop.tune.suggestion import Suggestion, Wait, generator
from rayloop.tune.trial import Trial

REPLACED_SHARE = 0.25
"""Share (0..1) of the population that is replaced at a turn, and from which share it is copied."""
RESAMPLE_SHARE = 0.25
"""Chance with which a setting is drawn anew instead of being changed a little."""
PERTURB_FACTORS = (0.8, 1.2)
CHANGEABLE = frozenset(
    {
        "train.learning_rate", "train.weight_decay", "train.label_smoothing", "train.clip_norm",
        "train.final_rate_share", "train.augment.flip", "train.augment.translate_px",
        "train.augment.erase_share", "train.augment.color_jitter",
    }
)  # fmt: skip
"""Settings that may change while a model is trained; the others decide what the model or its
optimizer is, or which rows it has seen."""


def check_population(config: TuneConfig, space: Space) -> None:
    """Refuse a space that a population cannot search.

    Raises:
        ConfigError: Names the fields that cannot change in the midst of a run.
    """
    fixed = [d.field for d in space.dimensions if d.field not in CHANGEABLE]
    if fixed:
        raise ConfigError(
            f"tune.search=pbt changes settings while a model is trained, which {', '.join(fixed)} "
            f"cannot; it can change {', '.join(sorted(CHANGEABLE))}. Leave the others out of "
            "tune.space, or use --tune.search tpe."
        )
    if config.trials < 4:
        raise ConfigError(
            f"tune.trials={config.trials} is too small a population for tune.search=pbt; use 4 or "
            "more."
        )


def num_turns(config: TuneConfig, epochs: float) -> int:
    """Turns of a whole run."""
    return max(1, math.ceil(epochs / config.perturb_epochs - 1e-9))


def num_trials_of_population(config: TuneConfig, epochs: float) -> int:
    """Members times turns."""
    return config.trials * num_turns(config, epochs)


def next_member(
    config: TuneConfig, space: Space, epochs: float, trials: Sequence[Trial]
) -> Suggestion | Wait:
    """The next member's turn; `Wait` until all members have ended the turn before.

    Raises:
        WorkError: A whole turn failed.
    """
    number, size = len(trials), config.trials
    turn, member = divmod(number, size)
    last = turn + 1 == num_turns(config, epochs)
    stop = 0.0 if last else config.perturb_epochs * (turn + 1)
    random = generator(config.seed, number)
    if turn == 0:
        return Suggestion(space.sample(random), stop_epochs=stop)
    before = trials[(turn - 1) * size : turn * size]
    if not all(trial.is_over for trial in before):
        return Wait.FOR_TRIALS
    parent, is_copy = _parent(config, before, member, random)
    assignment = parent.assignment
    if is_copy:
        assignment = perturbed(space, assignment, random)
    return Suggestion(assignment, parent.number, parent.records[-1]["epoch"], stop)


def _parent(
    config: TuneConfig, before: Sequence[Trial], member: int, random: np.random.Generator
) -> tuple[Trial, bool]:
    """Whose model a member goes on with, and whether it is another's."""
    name = config.objectives[0]
    ranked = sorted(
        (trial for trial in before if trial.status == "finished"),
        key=lambda trial: (-goodness(name, trial.figures), trial.number),
    )
    if not ranked:
        raise WorkError(
            f"All {len(before)} members of the population failed in one turn: {before[0].error}"
        )
    count = max(1, int(len(before) * REPLACED_SHARE))
    own = before[member]
    is_good = own in ranked[: max(1, len(ranked) - count)] or len(ranked) == 1
    if own.status == "finished" and is_good:
        return own, False
    donors = ranked[:count]
    return donors[int(random.integers(len(donors)))], True


def perturbed(space: Space, assignment: Assignment, random: np.random.Generator) -> Assignment:
    """Each setting made larger or smaller by a fifth, or, now and then, drawn anew."""
    changed: Assignment = {}
    for dimension in space.dimensions:
        fresh, chance = draw(dimension.domain, random), random.random()
        factor = PERTURB_FACTORS[int(random.integers(len(PERTURB_FACTORS)))]
        if not space.is_active(dimension, changed):
            continue
        old = assignment.get(dimension.field)
        if old is None or chance < RESAMPLE_SHARE:
            changed[dimension.field] = fresh
        elif isinstance(dimension.domain, Choice):
            changed[dimension.field] = old if old in dimension.domain.values else fresh
        else:
            changed[dimension.field] = _changed(dimension.domain, old, factor)
    return changed


def _changed(domain: Range, old: float, factor: float) -> float | int:
    """A number made larger or smaller, a whole one by at least one, within its range."""
    value = old * factor
    if domain.is_integer:
        value = old + (max(1, round(value - old)) if factor > 1 else min(-1, round(value - old)))
    value = min(max(value, domain.low), domain.high)
    return round(value) if domain.is_integer else value
