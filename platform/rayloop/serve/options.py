"""Turn the serving settings into Ray Serve's options, and its failures into one sentence."""

import re
from typing import Any

from rayloop.config import ServeConfig
from rayloop.errors import ConfigError

UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 5.0, 60.0
LOOK_BACK_S = 15.0
"""Autoscaling looks at the mean of so many seconds; Serve warns below 10."""


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """Keyword arguments for `serve.deployment`.

    The replica's own queue decides what is refused, since it counts rows and answers with 429; so
    Serve may hand a replica more requests than ever fit into it. One CPU of the replica is one
    thread of the engine.

    Raises:
        ConfigError: Settings contradict each other.
    """
    refuse_contradictions(config)
    options: dict[str, Any] = {
        "name": "classifier",
        "ray_actor_options": _resources(config),
        "max_ongoing_requests": config.max_queued_rows + 2 * config.max_batch_rows,
        "max_queued_requests": -1,
        "max_constructor_retry_count": 2,
        "health_check_period_s": 5,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    if config.max_replicas > config.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": target_ongoing_requests(config),
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
            "look_back_period_s": LOOK_BACK_S,
        }
    else:
        options["num_replicas"] = config.max_replicas
    if config.max_replicas == 1:  # an update of the only one starts the new one before
        options["max_surge_percent"] = 100
    return options


def refuse_contradictions(config: ServeConfig) -> None:
    """Check settings against each other.

    Raises:
        ConfigError: The message names both.
    """
    if config.max_rows_per_request > config.max_queued_rows:
        raise ConfigError(
            f"serve.max_rows_per_request={config.max_rows_per_request} is above "
            f"serve.max_queued_rows={config.max_queued_rows}: such a request could never be "
            "accepted. Lower the first or raise the second."
        )
    if config.max_batch_wait_ms >= config.default_timeout_ms:
        raise ConfigError(
            f"serve.max_batch_wait_ms={config.max_batch_wait_ms} is not below "
            f"serve.default_timeout_ms={config.default_timeout_ms}: requests would time out while "
            "they wait for company."
        )


def _resources(config: ServeConfig) -> dict[str, float]:
    """What a replica that answers requests reserves; without an engine in it, nothing."""
    if config.placement == "dedicated":
        return {"num_cpus": 0}
    found: dict[str, float] = {"num_cpus": config.cpus_per_replica}
    return found | {"num_gpus": 1} if config.use_gpu else found


def target_ongoing_requests(config: ServeConfig) -> float:
    """Requests in one replica that autoscaling aims at.

    That is a full batch running and half of one waiting.
    """
    return max(1.0, 1.5 * config.max_batch_rows)


def failure_reason(report: str) -> str:
    """The sentence that matters in Serve's report of a failed deployment.

    Args:
        report: Serve's messages, usually with a replica's traceback.

    Returns:
        The message of rayloop's own error where there is one, else the end of the report.
    """
    found = re.findall(r"rayloop\.errors\.\w+: (.+)", report)
    return str(found[-1]).strip() if found else report.strip()[-1500:]
