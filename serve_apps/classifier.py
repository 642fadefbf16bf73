"""Serve a registered classifier: `serve run serve_apps.classifier:build version=@champion`.

The environment of Serve itself (HAProxy, throughput mode) must be set before Ray starts; see
classifier.yaml beside this file. `make serve` and `python jobs/serve.py` do that by themselves.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from rayloop.config import EventsConfig, RegistryConfig, ServeConfig
from rayloop.serve.app import build_app
from rayloop.storage import home


class Args(BaseModel):
    """What `args:` in YAML, or `name=value` on the command line, may say."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("classifier", description="Name in the registry.")
    version: str = Field(
        "@champion",
        description="The champion leaves the traffic plan as it is; another gets all traffic.",
    )
    home: str = Field("", description="Root of the storage; empty means RAYLOOP_HOME.")
    tracking_uri: str = Field("", description="MLflow; empty means the database under home.")
    host: str = Field("127.0.0.1", description="As in `http_options`; gRPC answers no one else.")
    grpc_port: int = Field(9000, description="Without HAProxy; behind it see `grpc_options`.")
    model_control: bool = Field(True, description="Clients may load and unload versions.")
    min_replicas: int = 1
    max_replicas: int = 1
    cpus_per_replica: int = 1
    max_batch_rows: int = 32
    max_batch_wait_ms: float = 2.0
    max_queued_rows: int = 1024
    max_body_bytes: int = 33_554_432
    max_rows_per_request: int = 1024
    default_timeout_ms: float = 10_000.0
    placement: Literal["colocated", "dedicated"] = "colocated"
    plan_poll_s: float = Field(0.25, description="How soon a new traffic plan is noticed.")
    events: dict[str, bool | int | float] = Field(
        {}, description="Fields of `EventsConfig`: enabled, payload_share, retention_days, ..."
    )


NOT_SERVE = {"model", "version", "home", "tracking_uri", "events"}


def configs(args: Args) -> tuple[ServeConfig, EventsConfig]:
    """How to serve and what to remember, checked.

    Raises:
        ConfigError: A value is out of range.
        TypeError: `events` names something else.
    """
    settings: dict[str, Any] = args.model_dump(exclude=NOT_SERVE)
    kept: dict[str, Any] = args.events
    return ServeConfig(**settings), EventsConfig(**kept)


def build(args: Args) -> Application:
    """The application for these arguments."""
    config, events = configs(args)
    return build_app(
        config,
        RegistryConfig(model=args.model, tracking_uri=args.tracking_uri),
        args.home or home(),
        version=args.version,
        events=events,
    )
