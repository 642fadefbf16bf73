"""What an operator changes while replicas run -> the settings they go on with.

Everything else of the serving settings is read once, when a replica starts.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayloop.config import ServeConfig
from rayloop.errors import ConfigError
from rayloop.serve.options import refuse_contradictions

LIVE = ("max_queued_rows", "max_rows_per_request", "max_batch_wait_ms", "default_timeout_ms")
"""Settings that `user_config` of the deployment `classifier` changes in place."""


def with_limits(config: ServeConfig, changes: Mapping[str, Any]) -> ServeConfig:
    """The settings with some limits changed; what is not named is as at the start.

    Args:
        config: As the replica was started.
        changes: By name of the setting.

    Raises:
        ConfigError: A name or a value is not as it must be.
    """
    for name in changes:
        if name not in LIVE:
            close = difflib.get_close_matches(str(name), LIVE, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Set it under args and deploy anew."
            raise ConfigError(
                f"user_config.{name} cannot change while replicas run; {', '.join(LIVE)} can. "
                f"{hint}"
            )
        wanted = type(getattr(config, name))
        value = changes[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not _is_finite(value) or wanted(value) != value:
            raise ConfigError(f"user_config.{name}={value!r} is not of type {wanted.__name__}.")
    kinds = {name: type(getattr(config, name)) for name in changes}
    changed = replace(config, **{name: kinds[name](value) for name, value in changes.items()})
    refuse_contradictions(changed)
    return changed


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
