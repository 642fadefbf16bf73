"""Every setting is checked when it is made, with its name, its value and the way out."""

import dataclasses
import json
import math
from typing import Any

import pytest

from rayloop.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    PipelineConfig,
    QuantizeConfig,
    RegistryConfig,
    SelectConfig,
    ServeConfig,
    TrainConfig,
    digest,
    to_dict,
)
from rayloop.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        (DataConfig, {"val_share": -0.1}, "data.val_share=-0.1"),
        (DataConfig, {"val_share": math.nan}, "data.val_share=nan"),
        (DataConfig, {"val_share": 0.5, "test_share": 0.5}, "less than 5% for training"),
        (DataConfig, {"max_bad_share": 1.1}, "data.max_bad_share=1.1"),
        (DataConfig, {"rows_per_shard": 0}, "data.rows_per_shard=0"),
        (DataConfig, {"source": "parquet"}, "needs data.path"),
        (DataConfig, {"source": "image-folder"}, "needs data.path"),
        (DataConfig, {"name": "../up"}, "plain folder name"),
        (DataConfig, {"steps_per_block": 0}, "data.steps_per_block=0"),
        (ModelConfig, {"name": ""}, "model.name is empty"),
        (ModelConfig, {"widths": ()}, "model.widths=()"),
        (ModelConfig, {"widths": (8, 0)}, "model.widths=(8, 0)"),
        (AugmentConfig, {"translate_px": -1}, "train.augment.translate_px=-1"),
        (AugmentConfig, {"erase_share": 2.0}, "train.augment.erase_share=2.0"),
        (TrainConfig, {"epochs": 0}, "train.epochs=0"),
        (TrainConfig, {"epochs": math.inf}, "train.epochs=inf"),
        (TrainConfig, {"learning_rate": 0}, "train.learning_rate=0"),
        (TrainConfig, {"learning_rate": math.nan}, "train.learning_rate=nan"),
        (TrainConfig, {"num_workers": 0}, "train.num_workers=0"),
        (TrainConfig, {"num_workers": 3}, "train.num_workers=3; use 255 or 258"),
        (TrainConfig, {"global_batch_size": 1}, "train.num_workers=2; use 2."),
        (TrainConfig, {"micro_batch_size": 50}, "train.micro_batch_size=50 does not divide"),
        (TrainConfig, {"label_smoothing": 1.0}, "train.label_smoothing=1.0"),
        (TrainConfig, {"warmup_share": 1.5}, "train.warmup_share=1.5"),
        (TrainConfig, {"keep_checkpoints": 0}, "train.keep_checkpoints=0"),
        (TrainConfig, {"seed": -1}, "train.seed=-1"),
        (QuantizeConfig, {"min_agreement": 1.01}, "quantize.min_agreement=1.01"),
        (QuantizeConfig, {"batch_sizes": (1, 8)}, "must hold 1 and 32"),
        (RegistryConfig, {"model": "a/b"}, "registry.model='a/b'"),
        (RegistryConfig, {"min_margin_over_linear": 2.0}, "registry.min_margin_over_linear=2.0"),
        (SelectConfig, {"max_latency_ms": -1.0}, "select.max_latency_ms=-1.0"),
        (SelectConfig, {"max_latency_ms": math.nan}, "select.max_latency_ms=nan"),
        (SelectConfig, {"min_accuracy": 1.01}, "select.min_accuracy=1.01"),
        (SelectConfig, {"max_bytes": -1}, "select.max_bytes=-1"),
        (SelectConfig, {"runs": ("a",), "sweep": "b"}, "select.sweep=b exclude each other"),
        (SelectConfig, {"output": "../up"}, "select.output='../up'"),
        (ServeConfig, {"http_port": 70000}, "serve.http_port=70000"),
        (ServeConfig, {"min_replicas": 3}, "serve.min_replicas=3 is above"),
        (ServeConfig, {"max_queued_rows": 8}, "a batch could never fill"),
        (PipelineConfig, {"traffic_requests": 0}, "pipeline.traffic_requests=0"),
        (ClusterConfig, {"num_cpus": -1}, "cluster.num_cpus=-1"),
        (Config, {"run_id": "a/b"}, "run_id='a/b'"),
    ],
)
def test_what_is_out_of_range_is_refused(
    kind: type[Any], values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert told in str(caught.value)


def test_the_edges_of_ranges_are_allowed() -> None:
    DataConfig(val_share=0.0, test_share=0.9, max_bad_share=1.0, rows_per_shard=1)
    TrainConfig(epochs=0.001, num_workers=1, global_batch_size=1, warmup_share=1.0, seed=2**32 - 1)
    TrainConfig(global_batch_size=64, num_workers=2, micro_batch_size=16, worker_invariant=False)
    Config(run_id="a-b_c.1")


def test_derived_settings() -> None:
    assert TrainConfig(global_batch_size=96, num_workers=4).batch_size_per_worker == 24
    assert DataConfig(source="digits").dataset_name == "digits"
    assert DataConfig(source="digits", name="mine").dataset_name == "mine"


def test_settings_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run_id = "other"  # type: ignore[misc]


def test_the_digest_sees_each_value_and_survives_json() -> None:
    config = Config()
    assert digest(config) == digest(Config())
    assert digest(dataclasses.replace(config, run_id="x")) != digest(config)
    deep = dataclasses.replace(config, train=TrainConfig(augment=AugmentConfig(flip=False)))
    assert digest(deep) != digest(config)
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
    assert to_dict(ModelConfig(widths=(1, 2)))["widths"] == [1, 2]
