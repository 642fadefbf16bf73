"""Every model builds from its name, is decided by the seed, and takes the images as they are."""

import pytest
import torch
from torch import nn

from rayloop.config import ModelConfig
from rayloop.errors import ConfigError
from rayloop.models.classifier import (
    ImageClassifier,
    count_parameters,
    memory_bytes,
    summary,
)
from rayloop.models.zoo import OWN_NAMES, build_classifier


def build(
    name: str = "fastnet",
    shape: tuple[int, int, int] = (28, 28, 1),
    classes: int = 10,
    widths: tuple[int, ...] = (16, 48, 64),
    seed: int = 0,
    pretrained: bool = False,
) -> ImageClassifier:
    """A model by name."""
    channels = shape[2]
    model = ModelConfig(name=name, widths=widths, pretrained=pretrained)
    return build_classifier(model, shape, classes, (0.5,) * channels, (0.25,) * channels, seed)


def conv(before: int, after: int, side: int = 3) -> int:
    """Weights of a convolution without bias."""
    return before * after * side * side


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (8, 8, 1), (2, 3, 3), (12, 40, 1)])
@pytest.mark.parametrize("widths", [(4,), (16, 32), (8, 8, 8, 8)])
def test_own_models_give_finite_logits_and_gradients(
    name: str, shape: tuple[int, int, int], widths: tuple[int, ...]
) -> None:
    model = build(name, shape, 5, widths)
    logits = model(torch.randint(0, 256, (3, *shape), dtype=torch.uint8))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_models_take_grey_and_colour(name: str, channels: int) -> None:
    model = build(name, (32, 32, channels), 7).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 32, 32, channels, dtype=torch.uint8)).shape == (2, 7)


def test_parameter_counts() -> None:
    assert count_parameters(build("linear")) == 28 * 28 * 10 + 10
    stem = 1 * 16 * 4 + 16
    groups = [conv(a, b) + conv(b, b) + 4 * b for a, b in ((16, 16), (16, 48), (48, 64))]
    assert count_parameters(build("fastnet")) == stem + sum(groups) + 64 * 10
    narrow = count_parameters(build("tiny_resnet", widths=(8,)))
    blocks = 2 * (2 * conv(8, 8) + 4 * 8)
    assert narrow == conv(1, 8) + blocks + 2 * 8 + 8 * 10 + 10
    assert count_parameters(build("resnet18", (32, 32, 3), 1000)) == 11_689_512


def test_the_summary_tells_size_and_memory() -> None:
    model = build("linear")
    assert memory_bytes(model) == {"fp32": 31400, "bf16": 15700, "int8": 7850}
    assert summary(model, "linear") == (
        "model linear: 7,850 parameters; fp32 0.03 MB, bf16 0.02 MB, int8 0.01 MB"
    )


@pytest.mark.parametrize("name", [*OWN_NAMES, "resnet18"])
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    torch.manual_seed(1)
    one = build(name, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same, other = build(name, seed=5), build(name, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(mine, again) for mine, again, _ in pairs)
    assert any(not torch.equal(mine, different) for mine, _, different in pairs)


def test_normalisation_is_part_of_the_model() -> None:
    model = ImageClassifier(nn.Flatten(), (1, 2, 3), 6, (0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    images = torch.tensor([[[[0, 255, 51], [255, 0, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([[0.0, 1.0, 1.0, -1.0, -3.2, 0.0]])
    assert torch.allclose(model(images), expected, atol=1e-6)
    assert torch.equal(model(images), model(images.float()))


def test_a_block_of_the_residual_network_starts_as_its_shortcut() -> None:
    model = build("tiny_resnet", widths=(8,)).eval()
    block = model.network.get_submodule("blocks.0")
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", ["fastnett", "resnet", "fcn_resnet50", "r3d_18"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name='{name}' is neither linear, tiny_resnet"):
        build(name)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_own_models_have_no_published_weights(name: str) -> None:
    with pytest.raises(ConfigError, match="has no published weights"):
        build(name, pretrained=True)
