"""Limits change while replicas run: all of them together, or none."""

from typing import Any

import pytest

from rayloop.config import ServeConfig
from rayloop.errors import ConfigError
from rayloop.serve.limits import LIVE, with_limits

CONFIG = ServeConfig()


def test_what_is_named_changes_and_the_rest_is_as_at_the_start() -> None:
    changed = with_limits(CONFIG, {"max_queued_rows": 2048, "max_batch_wait_ms": 5})
    assert (changed.max_queued_rows, changed.max_batch_wait_ms) == (2048, 5.0)
    assert isinstance(changed.max_batch_wait_ms, float)
    assert with_limits(CONFIG, {}) == CONFIG
    assert {name: getattr(changed, name) for name in LIVE if "queued" not in name} == {
        "max_rows_per_request": CONFIG.max_rows_per_request,
        "max_batch_wait_ms": 5.0,
        "default_timeout_ms": CONFIG.default_timeout_ms,
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_queued_row": 5}, "Did you mean 'max_queued_rows'?"),
        ({"max_batch_rows": 64}, "user_config.max_batch_rows cannot change while replicas run"),
        ({"host": "0.0.0.0"}, "deploy anew"),
        ({"max_queued_rows": "many"}, "max_queued_rows='many' is not of type int"),
        ({"max_queued_rows": 1.5}, "max_queued_rows=1.5 is not of type int"),
        ({"max_queued_rows": True}, "max_queued_rows=True is not of type int"),
        ({"max_queued_rows": -1}, "max_queued_rows"),
        ({"max_queued_rows": float("inf")}, "max_queued_rows=inf is not of type int"),
        ({"default_timeout_ms": float("nan")}, "default_timeout_ms=nan is not"),
        ({"default_timeout_ms": 10**400}, "is not of type float"),
        ({"max_queued_rows": 512}, "could never be accepted"),
        ({"default_timeout_ms": 1}, "would time out while"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_limits(CONFIG, changes)
    assert told in str(caught.value)
