"""Spaces: what is read, drawn, laid into a grid, and refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.config import Config, TrainConfig
from rayloop.errors import ConfigError
from rayloop.presets import PRESETS
from rayloop.tune.declare import fields_to_search, parse_space
from rayloop.tune.space import Choice, Range, assign, value_of

BASE = Config()
MIXED = (
    "train.weight_decay=log(0.001, 0.5) if train.optimizer == adamw",
    "train.optimizer=choice(adamw, sgd, muon)",
    "train.learning-rate=log(0.001, 0.1)",
    "train.warmup_share=linear(0, 0.5)",
    "train.augment.translate_px=linear(0, 4)",
    "train.augment.flip=choice(true, false)",
    "model.widths=choice((8, 16), (16, 48, 64))",
)
SPACE = parse_space(MIXED, BASE)


def test_every_presets_own_space_is_one() -> None:
    for make in PRESETS.values():
        config = make()
        space = parse_space(config.tune.space, config)
        assert len(space.lines()) == len(config.tune.space)


@given(st.integers(0, 2**32))
def test_what_is_drawn_is_a_configuration_within_the_space(seed: int) -> None:
    assignment = SPACE.sample(np.random.default_rng(seed))
    config = assign(BASE, assignment)
    for field, value in assignment.items():
        assert value_of(config, field) == value
    assert 0.001 <= config.train.learning_rate <= 0.1
    assert 0 <= config.train.warmup_share <= 0.5
    assert isinstance(config.train.augment.translate_px, int)
    assert 0 <= config.train.augment.translate_px <= 4
    assert config.model.widths in ((8, 16), (16, 48, 64))
    assert ("train.weight_decay" in assignment) == (config.train.optimizer == "adamw")
    untouched = replace(config.train, **{
        name.split(".")[1]: value_of(BASE, name) for name in assignment
        if name.startswith("train.") and name.count(".") == 1
    }, augment=BASE.train.augment)  # fmt: skip
    assert untouched == BASE.train
    assert SPACE.matter(assignment) == assignment


def test_draws_are_even_in_the_value_or_in_its_logarithm() -> None:
    space = parse_space(
        ("train.learning_rate=log(0.0001, 1)", "train.label_smoothing=linear(0, 0.8)",
         "train.augment.translate_px=linear(0, 3)", "train.optimizer=choice(adamw, sgd)"), BASE
    )  # fmt: skip
    random = np.random.default_rng(0)
    drawn = [space.sample(random) for _ in range(4000)]
    rates = np.log10([each["train.learning_rate"] for each in drawn])
    assert np.histogram(rates, bins=4, range=(-4, 0))[0] == pytest.approx([1000] * 4, abs=110)
    smooth = [each["train.label_smoothing"] for each in drawn]
    assert np.histogram(smooth, bins=4, range=(0, 0.8))[0] == pytest.approx([1000] * 4, abs=110)
    pixels = np.bincount([each["train.augment.translate_px"] for each in drawn])
    assert pixels == pytest.approx([1000] * 4, abs=110)
    assert sum(each["train.optimizer"] == "sgd" for each in drawn) == pytest.approx(2000, abs=130)


def test_a_condition_moves_no_other_draw() -> None:
    """Else adding a condition would make another sweep of the same seed."""
    free = parse_space(MIXED[1:], BASE)
    both = parse_space(MIXED, BASE)
    for seed in range(20):
        one = free.sample(np.random.default_rng(seed))
        other = both.sample(np.random.default_rng(seed))
        other.pop("train.weight_decay", None)
        assert one == other


@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e4), st.floats(0, 1), st.booleans())
def test_a_range_goes_from_its_low_to_its_high(
    low: float, factor: float, share: float, is_log: bool
) -> None:
    domain = Range(low, low * factor, is_log, is_integer=False)
    assert domain.at(0) == pytest.approx(low)
    assert domain.at(1) == pytest.approx(low * factor)
    assert domain.low <= domain.at(share) <= domain.high
    assert domain.share_of(domain.at(share)) == pytest.approx(share, abs=1e-6)


def test_a_grid_has_every_combination_once_and_conditions_save_some() -> None:
    space = parse_space(
        (
            "train.optimizer=choice(adamw, sgd)",
            "train.learning_rate=log(0.001, 0.1, 3)",
            "train.weight_decay=linear(0, 0.2, 2) if train.optimizer == adamw",
            "train.augment.translate_px=linear(0, 1, 4)",
        ),
        BASE,
    )
    grid = space.grid()
    # The two whole numbers from 0 to 1 come once, however many points are asked for.
    assert len(grid) == 3 * 2 * (2 + 1)
    assert len({tuple(sorted(each.items())) for each in grid}) == len(grid)
    assert {round(each["train.learning_rate"], 6) for each in grid} == {0.001, 0.01, 0.1}
    assert [each for each in grid if each["train.optimizer"] == "sgd" and len(each) == 4] == []


def test_a_field_may_have_a_range_for_each_case() -> None:
    space = parse_space(
        (
            "train.optimizer=choice(adamw, sgd)",
            "train.learning_rate=log(0.001, 0.01) if train.optimizer == adamw",
            "train.learning_rate=log(0.1, 1) if train.optimizer == sgd",
        ),
        BASE,
    )
    for seed in range(50):
        drawn = space.sample(np.random.default_rng(seed))
        assert (drawn["train.learning_rate"] >= 0.1) == (drawn["train.optimizer"] == "sgd")


def test_a_condition_may_look_at_a_field_that_is_not_searched() -> None:
    space = parse_space(("train.clip_norm=linear(0, 2) if train.optimizer == adamw",), BASE)
    assert "train.clip_norm" in space.sample(np.random.default_rng(0))


def test_domains_are_printed_as_they_are_written() -> None:
    for text in MIXED:
        [dimension] = parse_space((text, *(MIXED[1:2] if "if" in text else ())), BASE).dimensions[
            -1:
        ]
        assert str(dimension).replace("True", "true").replace("False", "false") == text.replace(
            "-", "_"
        )
    assert str(Choice(((8, 16), 3))) == "choice((8, 16), 3)"


REFUSED = {
    (): "empty: there is nothing to search",
    ("train.lerning_rate=log(0.1, 1)",): "Did you mean train.learning_rate?",
    ("learning_rate=log(0.1, 1)",): "Did you mean train.learning_rate?",
    ("train.learning_rate",): "has no '='",
    ("train.learning_rate=0.1",): "write a domain",
    ("train.learning_rate=log(0.1, 1",): "write a domain",
    ("train.learning_rate=lgo(0.1, 1)",): "Did you mean log?",
    ("train.learning_rate=log(1, 0.1)",): "1.0 is not below 0.1",
    ("train.learning_rate=log(0, 1)",): "must begin above 0",
    ("train.learning_rate=log(0.1)",): "smallest and largest number",
    ("train.learning_rate=log(0.1, 1, 1)",): "at least 2 points",
    ("train.learning_rate=log(a, b)",): "smallest and largest number",
    ("train.learning_rate=choice(a)",): "takes a number, not 'a'",
    ("train.learning_rate=choice()",): "a choice of nothing",
    ("train.learning_rate=choice(1, 1.0)",): "names a value twice",
    ("train.learning_rate=choice(1 + x)",): "is no plain value",
    ("train.global_batch_size=linear(2, 1e999)",): "is no plain value",
    ("train.learning_rate=choice({1: 2})",): "is no plain value",
    (
        "train.learning_rate=log(0.001, 0.1)",
        "train.clip_norm=linear(0, 2) if train.learning_rate == 5",
    ): "never holds: train.learning_rate is from 0.001 to 0.1",
    ("train.optimizer=log(1, 2)",): "is no number; use choice",
    ("train.optimizer=choice(adam)",): "takes one of adamw, sgd, muon",
    ("train.augment.flip=choice(1, 0)",): "takes true or false",
    ("train.augment.translate_px=linear(0.5, 2)",): "takes a whole number",
    ("model.widths=choice(8, 16)",): "takes a list",
    ("train.num_workers=choice(1, 2)",): "no score depends on it",
    ("serve.http_port=choice(1, 2)",): "decide what is trained",
    ("train.label_smoothing=linear(0, 2)",): "out of range; use a value from 0 to 0.99",
    ("train.global_batch_size=choice(64, 63)",): "is not a multiple of train.num_workers",
    ("train.clip_norm=linear(0, 2)", "train.clip_norm=linear(0, 3)"): "is declared twice",
    ("train.clip_norm=linear(0, 2) if train.optimizer == sgd",): "never holds: train.optimizer is",
    ("train.clip_norm=linear(0, 2) if train.optimizer = sgd",): "a condition is",
    ("train.clip_norm=linear(0, 2) if train.optimizer > sgd",): "compares with == or in",
    ("train.clip_norm=linear(0, 2) if train.clip_norm == 1",): "looks at itself",
    (
        "train.ema_decay=choice(0, 0.9) if train.augment.flip == true",
        "train.augment.flip=choice(true, false) if train.ema_decay == 0",
    ): "conditions go round",
    (
        "train.optimizer=choice(sgd, muon)",
        "train.clip_norm=linear(0, 2) if train.optimizer == adamw",
    ): "never holds: train.optimizer is sgd or muon",
}


@pytest.mark.parametrize("texts", REFUSED, ids=lambda texts: "; ".join(texts)[:60])
def test_a_space_that_makes_no_sense_is_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_space(texts, BASE)
    assert REFUSED[texts] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_contradiction_of_two_fields_is_found() -> None:
    texts = ("train.worker_invariant=choice(true, false)", "train.norm_group_rows=choice(0, 32)")
    with pytest.raises(ConfigError, match="train.worker_invariant=True, train.norm_group_rows=0"):
        parse_space(texts, BASE)


def test_a_grid_needs_points_and_an_end() -> None:
    with pytest.raises(ConfigError, match=r"needs the number of points.*log\(0.001, 0.1, 4\)"):
        parse_space(("train.learning_rate=log(0.001, 0.1)",), BASE).grid()
    many = tuple(
        f"train.{name}=linear(0, 0.5, 60)"
        for name in ("label_smoothing", "warmup_share", "final_rate_share")
    )
    with pytest.raises(ConfigError, match="more than 100,000 combinations"):
        parse_space(many, BASE).grid()


def test_only_what_decides_the_training_can_be_searched() -> None:
    fields = fields_to_search()
    assert {"train.learning_rate", "train.augment.flip", "model.widths"} <= set(fields)
    assert not {"train.num_workers", "train.max_failures", "serve.host"} & set(fields)
    assert all(value_of(BASE, field) is not None for field in fields)
    assert isinstance(BASE.train, TrainConfig)
