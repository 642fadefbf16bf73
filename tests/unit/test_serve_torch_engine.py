"""The torch engine gives the model's own probabilities, whatever the batch it fills up."""

import numpy as np
import pytest
import torch

from rayloop.config import ModelConfig, ServeConfig
from rayloop.errors import ConfigError, DoesNotFit
from rayloop.models.zoo import build_classifier
from rayloop.serve.options import deployment_options
from rayloop.serve.protocol.spec import ModelSpec, config_document, model_document
from rayloop.serve.torch_engine import TorchEngine

SHAPE = (8, 8, 1)


@pytest.fixture
def model():
    return build_classifier(ModelConfig(widths=(8, 16)), SHAPE, 10, (0.3,), (0.4,), 0).eval()


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 256, (rows, *SHAPE), dtype=np.uint8)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
def test_probabilities_are_the_models_own_in_any_batch(model, rows: int) -> None:
    with torch.inference_mode():
        expected = torch.softmax(model(torch.from_numpy(images(rows))), 1).numpy()
    engine = TorchEngine(model, max_batch_rows=12)
    found = engine.predict(images(rows))
    assert (found.shape, found.dtype, engine.shape) == ((rows, 10), np.float32, SHAPE)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_bf16_is_near(model) -> None:
    full, half = (TorchEngine(model, precision=name) for name in ("fp32", "bf16"))
    difference = np.abs(full.predict(images(16)) - half.predict(images(16))).max()
    assert 0 < difference < 0.05


def test_batches_are_filled_up_to_warm_sizes(model, monkeypatch) -> None:
    engine = TorchEngine(model, max_batch_rows=12)
    seen: list[int] = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda pixels: seen.append(len(pixels)) or run(pixels))
    engine.warm((1, 2, 4, 8, 12))
    for rows in range(1, 13):
        engine.predict(images(rows))
    assert sorted(set(seen)) == [1, 2, 4, 8, 12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said(model) -> None:
    with pytest.raises(DoesNotFit, match=r"serve\.use_gpu"):
        TorchEngine(model, use_gpu=True)


def test_clients_are_told_what_runs_the_model() -> None:
    spec = ModelSpec(model="m", version="1", shape=SHAPE, class_names=("a", "b"), engine="torch")
    assert model_document(spec, ["1"])["platform"] == "pytorch"
    config = config_document(spec, ["1"], ServeConfig(engine="torch", use_gpu=True))
    assert (config["backend"], config["instance_group"][0]["kind"]) == ("pytorch", "KIND_GPU")


def test_settings_of_torch_need_torch() -> None:
    with pytest.raises(ConfigError, match=r"serve\.engine=torch"):
        ServeConfig(use_gpu=True)
    options = deployment_options(ServeConfig(engine="torch", use_gpu=True))
    assert options["ray_actor_options"]["num_gpus"] == 1
