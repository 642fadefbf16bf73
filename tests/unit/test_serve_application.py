"""The application for `serve run` and `serve deploy`, as far as it goes without Ray."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from rayloop.config import EventsConfig, ServeConfig
from rayloop.errors import ConfigError
from serve_apps.classifier import Args, configs

PRODUCTION = Path(__file__).parents[2] / "serve_apps" / "classifier.yaml"


def test_the_production_file_is_understood() -> None:
    (application,) = yaml.safe_load(PRODUCTION.read_text())["applications"]
    config, events = configs(Args(**application["args"]))
    assert (config.min_replicas, config.max_replicas, config.host) == (2, 8, "0.0.0.0")
    assert events.payload_share == 0.01


def test_without_arguments_it_is_the_laptops_server() -> None:
    assert configs(Args()) == (ServeConfig(), EventsConfig())


def test_typos_and_impossible_values_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replica"):
        Args(max_replica=2)
    with pytest.raises(ConfigError, match="events.payload_share=2"):
        configs(Args(events={"payload_share": 2}))
    with pytest.raises(TypeError, match="payload"):
        configs(Args(events={"payload": 1}))
