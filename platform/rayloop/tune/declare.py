"""Texts such as `train.learning_rate=log(0.001, 0.1)` -> a space of configurations to search.

One text declares one dimension: a field of the configuration, its domain, and, where it only
matters then, a condition:

    train.learning_rate=log(0.001, 0.1)            even in the logarithm
    train.label_smoothing=linear(0, 0.2)           even in the value
    model.widths=choice((16, 32), (32, 64))        one of these
    train.weight_decay=log(0.001, 0.5) if train.optimizer == adamw
    train.clip_norm=linear(0, 2, 3) if train.optimizer in (sgd, muon)     3 points in a grid

A field of whole numbers gets whole numbers. A field may be declared twice if the conditions exclude
each other.
"""

import ast
import dataclasses
import difflib
import itertools
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rayloop.config import Config
from rayloop.errors import ConfigError
from rayloop.train.claim import OPERATIONAL
from rayloop.tune.space import (
    Choice,
    Condition,
    Dimension,
    Range,
    Space,
    assign,
    value_of,
)

SECTIONS = ("model", "train")
TRIED_SAMPLES = 200
TRIED_ENDS = 30
EXAMPLE = "as in train.learning_rate=log(0.001, 0.1) or train.optimizer=choice(adamw, sgd)"


def parse_space(texts: Sequence[str], base: Config) -> Space:
    """Read a space, and refuse one in which some combination is no configuration.

    Args:
        texts: One dimension each, as in the module's docstring.
        base: Settings of everything that is not searched.

    Raises:
        ConfigError: The space is empty, names a field that does not exist, has a domain that does
            not suit its field, or contradicts itself.
    """
    if not texts:
        raise ConfigError(f"tune.space is empty: there is nothing to search. Declare it {EXAMPLE}.")
    dimensions = _in_order([_parse(text) for text in texts])
    _refuse_doubles(dimensions)
    space = Space(tuple(dimensions), base)
    _refuse_unreachable(space)
    _refuse_contradictions(space)
    return space


def fields_to_search() -> dict[str, Any]:
    """Every field a space may name, with its type: those that decide what is trained."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(Config)
    for section in SECTIONS:
        _collect(hints[section], section, found)
    return found


def _collect(cls: Any, prefix: str, found: dict[str, Any]) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if prefix == "train" and field.name in OPERATIONAL:
            continue
        path, kind = f"{prefix}.{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            _collect(kind, path, found)
        else:
            found[path] = kind


def _parse(text: str) -> Dimension:
    field_text, found, rest = text.partition("=")
    if not found:
        raise ConfigError(f"tune.space has {text!r}, which has no '='; write it {EXAMPLE}.")
    field, kind = _known_field(field_text.strip(), text)
    domain_text, _, condition_text = rest.partition(" if ")
    domain = _parse_domain(domain_text.strip(), field, kind, text)
    condition = _parse_condition(condition_text.strip(), text) if condition_text else None
    if condition and condition.field == field:
        raise ConfigError(f"tune.space has {text!r}, whose condition looks at itself.")
    return Dimension(field, domain, condition)


def _known_field(name: str, text: str) -> tuple[str, Any]:
    field = name.replace("-", "_")
    known = fields_to_search()
    if field in known:
        return field, known[field]
    if field.removeprefix("train.") in OPERATIONAL and field.startswith("train."):
        raise ConfigError(
            f"tune.space has {text!r}: {field} says how the work is done and not what is trained, "
            "so no score depends on it."
        )
    close = difflib.get_close_matches(field, known, n=1) or [
        path for path in known if path.rsplit(".", 1)[1] == field.rsplit(".", 1)[-1]
    ]
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"tune.space has {text!r}, and there is no field {field!r} among those that decide what is "
        f"trained (model.* and train.*).{hint}"
    )


def _parse_domain(words: str, field: str, kind: Any, text: str) -> Range | Choice:
    try:
        call = ast.parse(words, mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise ConfigError(f"tune.space has {text!r}; after '=' write a domain, {EXAMPLE}.")
    name, values = call.func.id, [_literal(argument, text) for argument in call.args]
    if name == "choice":
        if not values:
            raise ConfigError(f"tune.space has {text!r}, a choice of nothing; name its values.")
        chosen = tuple(_typed(value, field, kind, text) for value in values)
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"tune.space has {text!r}, which names a value twice.")
        return Choice(chosen)
    if name not in ("linear", "log"):
        close = difflib.get_close_matches(name, ("linear", "log", "choice"), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"tune.space has {text!r}: there is no domain {name!r}, only linear, log and choice."
            f"{hint}"
        )
    return _range(values, name == "log", field, kind, text)


def _range(values: list[Any], is_log: bool, field: str, kind: Any, text: str) -> Range:
    if kind not in (int, float):
        raise ConfigError(
            f"tune.space has {text!r}, but {field} is no number; use choice(...) with its values."
        )
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if (
        len(values) not in (2, 3)
        or not numbers
        or (len(values) == 3 and values[2] != int(values[2]))
    ):
        raise ConfigError(
            f"tune.space has {text!r}; a range is its smallest and largest number and, for a grid, "
            f"how many points, {EXAMPLE}."
        )
    low, high = (_typed(value, field, kind, text) for value in values[:2])
    points = int(values[2]) if len(values) == 3 else 0
    if not low < high:
        raise ConfigError(f"tune.space has {text!r}, an empty range: {low} is not below {high}.")
    if is_log and low <= 0:
        raise ConfigError(
            f"tune.space has {text!r}: a logarithmic range must begin above 0, not at {low}; use "
            "linear, or a small number."
        )
    if len(values) == 3 and points < 2:
        raise ConfigError(f"tune.space has {text!r}; a grid takes at least 2 points of a range.")
    return Range(low, high, is_log, kind is int, points)


def _parse_condition(words: str, text: str) -> Condition:
    try:
        node = ast.parse(words, mode="eval").body
    except SyntaxError:
        node = None
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise ConfigError(
            f"tune.space has {text!r}; a condition is 'FIELD == VALUE' or 'FIELD in (A, B)'."
        )
    field, kind = _known_field(ast.unparse(node.left), text)
    if isinstance(node.ops[0], ast.Eq):
        values = [_literal(node.comparators[0], text)]
    elif isinstance(node.ops[0], ast.In) and isinstance(node.comparators[0], ast.Tuple | ast.List):
        values = [_literal(element, text) for element in node.comparators[0].elts]
    else:
        raise ConfigError(f"tune.space has {text!r}; a condition compares with == or in.")
    return Condition(field, tuple(_typed(value, field, kind, text) for value in values))


def _literal(node: ast.expr, text: str) -> Any:
    """A value as it is written: a number, a word without quotes, or a tuple of them."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id.lower(), node.id)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(element, text) for element in node.elts)
    try:
        value = ast.literal_eval(node)
        hash(value)
        if not isinstance(value, float) or math.isfinite(value):
            return value
        raise ValueError(value)
    except (ValueError, TypeError):
        raise ConfigError(
            f"tune.space has {text!r}, where {ast.unparse(node)!r} is no plain value; put a name "
            "with signs in it into quotes."
        ) from None


def _typed(value: Any, field: str, kind: Any, text: str) -> Any:
    """The value as the field's type, or an error that says what the field takes."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, tuple):
        return tuple(_typed(element, field, arguments[0], text) for element in value)
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
    takes = wanted.get(kind) or (
        f"one of {', '.join(map(str, arguments))}"
        if origin is Literal
        else "a list such as (16, 32)"
    )
    raise ConfigError(f"tune.space has {text!r}, but {field} takes {takes}, not {value!r}.")


def _in_order(dimensions: list[Dimension]) -> list[Dimension]:
    """Each after those its condition looks at; else as declared."""
    ordered: list[Dimension] = []
    left = list(dimensions)
    while left:
        waiting = {dimension.field for dimension in left}
        ready = [d for d in left if d.condition is None or d.condition.field not in waiting]
        if not ready:
            circle = "; ".join(str(dimension) for dimension in left)
            raise ConfigError(f"tune.space contradicts itself: its conditions go round: {circle}.")
        ordered += ready
        left = [dimension for dimension in left if dimension not in ready]
    return ordered


def _refuse_doubles(dimensions: Sequence[Dimension]) -> None:
    for one, other in itertools.combinations(dimensions, 2):
        if one.field != other.field:
            continue
        a, b = one.condition, other.condition
        if a is None or b is None or a.field != b.field or set(a.values) & set(b.values):
            raise ConfigError(
                f"tune.space contradicts itself: {one.field} is declared twice ({one} and {other})."
                " Keep one, or give each a condition on the same field with other values."
            )


def _refuse_unreachable(space: Space) -> None:
    """A condition that no combination can meet is a mistake, not a choice."""
    for dimension in space.dimensions:
        condition = dimension.condition
        if condition is None:
            continue
        domains = [d.domain for d in space.dimensions if d.field == condition.field]
        if not domains:
            possible = [value_of(space.base, condition.field)]
        else:
            possible = [v for d in domains for v in _possible(d, condition.values)]
        if not set(possible) & set(condition.values):
            raise ConfigError(
                f"tune.space has '{dimension}', which never holds: {condition.field} is "
                f"{' or '.join(str(value) for value in possible)}."
            )


def _possible(domain: Range | Choice, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values of a domain, or, of a range, its ends and those that are wanted and can be drawn.

    A given real number is never drawn from a range.
    """
    if isinstance(domain, Choice):
        return domain.values
    ends = (f"from {domain.low:g} to {domain.high:g}",)
    if not domain.is_integer:
        return ends
    return ends + tuple(value for value in wanted if domain.low <= value <= domain.high)


def _refuse_contradictions(space: Space) -> None:
    """Try the ends of each dimension and many draws: each must be a configuration."""
    random = np.random.default_rng(0)
    drawn = [space.sample(random) for _ in range(TRIED_SAMPLES)]
    ends = [
        space.matter({**assignment, dimension.field: value})
        for dimension in space.dimensions
        for assignment in drawn[:TRIED_ENDS]
        if space.is_active(dimension, assignment)
        for value in _ends(dimension.domain)
    ]
    for assignment in drawn + ends:
        try:
            assign(space.base, assignment)
        except ConfigError as error:
            told = ", ".join(f"{field}={value}" for field, value in assignment.items())
            raise ConfigError(f"tune.space allows {told}, and that is refused: {error}") from None


def _ends(domain: Range | Choice) -> tuple[Any, ...]:
    if isinstance(domain, Choice):
        return domain.values
    return domain.at(0.0), domain.at(1.0)
