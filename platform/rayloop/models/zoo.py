"""A model's name -> a built and initialised `ImageClassifier`."""

from collections.abc import Sequence

import torch
from torch import nn

from rayloop.config import ModelConfig
from rayloop.errors import ConfigError, DataMissing
from rayloop.models.classifier import ImageClassifier
from rayloop.models.fastnet import FastNet
from rayloop.models.tiny_resnet import TinyResNet

OWN_NAMES = ("linear", "tiny_resnet", "fastnet")


def build_classifier(
    model: ModelConfig,
    shape: tuple[int, int, int],
    num_classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    seed: int,
) -> ImageClassifier:
    """Build a model whose initial weights are decided by `seed` alone.

    Args:
        model: The model section.
        shape: Height, width, channels of an image.
        num_classes: Logits.
        pixel_mean: Per-channel mean of the training images, scaled to 0..1.
        pixel_std: Per-channel standard deviation, same scale.
        seed: Decides the initial weights; torch's global random state is left as it was.

    Raises:
        ConfigError: There is no model of that name.
        DataMissing: Pretrained weights are wanted and not at hand.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build_network(model, shape, num_classes)
    return ImageClassifier(network, shape, num_classes, pixel_mean, pixel_std)


def _build_network(model: ModelConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    height, width, channels = shape
    if model.pretrained and model.name in OWN_NAMES:
        raise ConfigError(
            f"model.pretrained=True needs a torchvision model; {model.name!r} has no published "
            "weights. Use --model.no-pretrained, or for example --model.name resnet18."
        )
    if model.name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(height * width * channels, num_classes))
    if model.name == "tiny_resnet":
        return TinyResNet(channels, num_classes, model.widths)
    if model.name == "fastnet":
        return FastNet(channels, num_classes, model.widths, min(height, width))
    return _from_torchvision(model, channels, num_classes)


def _from_torchvision(model: ModelConfig, channels: int, num_classes: int) -> nn.Module:
    from torchvision import models as published  # noqa: PLC0415  takes a second to import

    known = published.list_models(module=published)
    if model.name not in known:
        raise ConfigError(
            f"model.name={model.name!r} is neither {', '.join(OWN_NAMES)} nor one of torchvision's "
            f"{len(known)} classification models (resnet18, mobilenet_v3_small, ...)."
        )
    if not model.pretrained:
        network = published.get_model(model.name, weights=None, num_classes=num_classes)
        return _Grey(network) if channels == 1 else network
    try:
        network = published.get_model(model.name, weights="DEFAULT")
    except (OSError, RuntimeError) as error:
        raise DataMissing(
            f"model.pretrained=True, and the weights of {model.name} are neither in "
            f"{torch.hub.get_dir()}/checkpoints nor downloadable ({error}). Put the .pth file "
            "there, or use --model.no-pretrained."
        ) from None
    _replace_head(network, num_classes)
    return _Grey(network) if channels == 1 else network


class _Grey(nn.Module):
    """Feed one-channel images to a network made for three."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images_NCHW.expand(-1, 3, -1, -1))
        return logits


def _replace_head(network: nn.Module, num_classes: int) -> None:
    """Put a fresh linear layer in the place of the last one."""
    name, last = [
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)
    ][-1]
    parent_name, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent_name), leaf, nn.Linear(last.in_features, num_classes))
