"""uint8 images -> class logits: normalisation and network in one module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """A network together with the preprocessing it was trained with.

    Since normalisation lives here, the exported graph, batch prediction and the server take the
    same uint8 images and cannot disagree about it.

    Args:
        network: Maps normalised images (N, C, H, W) to logits (N, K).
        shape: Height, width, channels of an image.
        num_classes: K.
        pixel_mean: Per-channel mean of the training images, pixels scaled to 0..1.
        pixel_std: Per-channel standard deviation, same scale.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network
        self.shape = shape
        self.num_classes = num_classes
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.register_buffer("scale", (1 / (255 * std)).reshape(1, -1, 1, 1))
        self.register_buffer("offset", (-mean / std).reshape(1, -1, 1, 1))

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """Logits (N, K) of images (N, H, W, C), uint8 or numbers from 0 to 255.

        The permuted view of contiguous NHWC images is already in channels_last order.
        """
        images_NCHW = images_NHWC.permute(0, 3, 1, 2).to(self.scale.dtype)
        logits: Tensor = self.network(images_NCHW * self.scale + self.offset)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Numbers the optimizer may change."""
    return sum(parameter.numel() for parameter in model.parameters())


def memory_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters in fp32, bf16 and int8."""
    count = count_parameters(model)
    return {"fp32": 4 * count, "bf16": 2 * count, "int8": count}


def summary(model: nn.Module, name: str) -> str:
    """One line to print before training starts: parameters, and memory by number format."""
    sizes = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in memory_bytes(model).items())
    return f"model {name}: {count_parameters(model):,} parameters; {sizes}"
