"""How trials are trained and how many at once, by what the cluster has."""

from dataclasses import replace
from typing import Any

import pytest

from rayloop.config import Config, TuneConfig
from rayloop.errors import ConfigError, DoesNotFit
from rayloop.tune.room import plan_room

LAPTOP = [(4.0, 0.0)]  # two cores, offered as four


def config_of(workers: int = 2, cpus: int = 0, use_gpu: bool = False, **tune: Any) -> Config:
    """A sweep's settings."""
    base = Config()
    train = replace(base.train, num_workers=workers, cpus_per_worker=cpus, use_gpu=use_gpu)
    return replace(base, train=train, tune=TuneConfig(**tune))


@pytest.mark.parametrize(
    ("config", "nodes", "kind", "at_once"),
    [
        (config_of(), LAPTOP, "function", 2),
        (config_of(cpus=2), LAPTOP, "function", 1),
        (config_of(), [(3.0, 0.0)], "function", 1),
        (config_of(), [(16.0, 0.0)], "ddp", 7),
        (config_of(workers=1), [(16.0, 0.0)], "function", 14),
        (config_of(search="pbt", trials=4), [(16.0, 0.0)], "function", 14),
        (config_of(trainable="ddp"), LAPTOP, "ddp", 1),
        (config_of(trainable="function"), [(16.0, 0.0)], "function", 14),
        (config_of(max_concurrent=3), [(16.0, 0.0)], "ddp", 3),
        (config_of(use_gpu=True), [(16.0, 4.0)], "ddp", 2),
        (config_of(use_gpu=True), [(16.0, 2.0)], "function", 2),
        (config_of(), [(2.0, 0.0)], "function", 2),
        # A worker stays on one node: 3 CPUs of each of two nodes are one worker of 2 each.
        (config_of(cpus=2, trainable="ddp"), [(3.0, 0.0), (3.0, 0.0)], "ddp", 1),
        (config_of(), [(8.0, 0.0)] * 50, "ddp", 175),
    ],
)
def test_room_follows_from_the_nodes(
    config: Config, nodes: list[tuple[float, float]], kind: str, at_once: int
) -> None:
    room = plan_room(config, nodes)
    assert (room.kind, room.max_concurrent) == (kind, at_once)
    assert room.num_workers == (config.train.num_workers if kind == "ddp" else 1)


def test_memory_limits_how_many_run_at_once() -> None:
    """Twenty CPUs on a machine of 23 GB: nine trials of four processes each filled it once."""
    assert plan_room(config_of(), [(20.0, 0.0)]).max_concurrent == 9
    assert plan_room(config_of(), [(20.0, 0.0)], memory_bytes=10e9).max_concurrent == 5
    assert plan_room(config_of(workers=1), LAPTOP, memory_bytes=0.7e9).max_concurrent == 1
    assert plan_room(config_of(), LAPTOP, memory_bytes=0.1e9).max_concurrent == 1


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (config_of(cpus=8), "needs 8 CPUs and 0 GPUs; the cluster has 4 CPUs, 2 of them"),
        (config_of(workers=8, trainable="ddp"), "tune.trainable=ddp needs 8 CPUs"),
        (config_of(use_gpu=True), "and 0 GPUs on 1 node"),
        (config_of(max_concurrent=5), "max_concurrent=5.*room for 2"),
    ],
)
def test_what_never_fits_is_refused(config: Config, told: str) -> None:
    with pytest.raises(DoesNotFit, match=told):
        plan_room(config, LAPTOP)


def test_what_starts_the_workers_needs_a_little_too() -> None:
    """Four workers of 4 CPUs fill two nodes of 8 to the last CPU, and could never start."""
    config = config_of(workers=4, cpus=4, trainable="ddp")
    with pytest.raises(DoesNotFit, match="needs 16 CPUs"):
        plan_room(config, [(8.0, 0.0), (8.0, 0.0), (2.0, 0.0)])


def test_data_that_does_not_fit_is_streamed_to_workers() -> None:
    config = config_of()
    streamed = replace(config, data=replace(config.data, feed="stream"))
    assert plan_room(streamed, LAPTOP).kind == "ddp"
    with pytest.raises(ConfigError, match="data.feed=stream says that they do not fit"):
        plan_room(replace(streamed, tune=TuneConfig(trainable="function")), LAPTOP)


def test_a_population_is_not_trained_by_workers() -> None:
    with pytest.raises(ConfigError, match="Use --tune.trainable function"):
        plan_room(config_of(search="pbt", trials=4, trainable="ddp"), LAPTOP)
