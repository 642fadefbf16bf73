"""A small fast network in the spirit of the CIFAR-10 speed runs.

The shape is that of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds"): a 2x2 stem, then
groups of convolution, pooling, norm, activation, convolution, norm, activation; a global maximum;
one linear layer whose output is scaled down. Early pooling is what makes it fast: only the first
convolution of a group sees the larger image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORM_MOMENTUM = 0.1


class ConvGroup(nn.Module):
    """3x3 convolution, 2x2 maximum, norm, ReLU, 3x3 convolution, norm, ReLU.

    Images with a side of 1 are not pooled further.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm1 = nn.BatchNorm2d(out_channels, momentum=NORM_MOMENTUM)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, momentum=NORM_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in, H, W) to (N, out, H / 2, W / 2)."""
        x = self.relu(self.norm1(self.pool(self.conv1(x))))
        out: Tensor = self.relu(self.norm2(self.conv2(x)))
        return out


def _pass_through(conv: nn.Conv2d) -> None:
    """Let the first filters hand on their input channels, as in airbench94's dirac start."""
    count = min(conv.in_channels, conv.out_channels)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:count])


class FastNet(nn.Module):
    """Stem, one `ConvGroup` for each width, global maximum, linear layer.

    Args:
        in_channels: Channels of an image.
        num_classes: Logits.
        widths: Channels of each group.
        side: The image's smaller side, which decides how often can be pooled.
    """

    def __init__(
        self, in_channels: int, num_classes: int, widths: Sequence[int], side: int
    ) -> None:
        super().__init__()
        stem_width = max(8, min(24, widths[0]))
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem_width, 2, bias=True), nn.ReLU(inplace=True)
        )
        groups: list[nn.Module] = []
        side -= 1
        for before, width in zip((stem_width, *widths), widths, strict=False):
            groups.append(ConvGroup(before, width, pool=side >= 2))
            side = max(1, side // 2)
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = 1 / 9
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if isinstance(module, ConvGroup):
                _pass_through(module.conv1)
                _pass_through(module.conv2)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        features: Tensor = self.pool(self.groups(self.stem(images_NCHW))).flatten(1)
        logits: Tensor = self.head(features) * self.logit_scale
        return logits
