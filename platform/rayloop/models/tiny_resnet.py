"""A small residual network for small images (He et al. 2016, pre-activation order as of 2016b)."""

from collections.abc import Sequence

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: x + conv(relu(norm(conv(relu(norm(x))))).

    Where width or stride change, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = (
            nn.Sequential(  # a strided 1x1 convolution; as one layer its backward pass in oneDNN
                nn.MaxPool2d(1, stride),  # writes beyond its memory (uxlfoundation/oneDNN#6035)
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
            )
            if changes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in, H, W) to (N, out, H / stride, W / stride)."""
        active = self.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu(self.norm2(self.conv1(active))))
        return out + kept


class TinyResNet(nn.Module):
    """A stem, two residual blocks for each width, global mean, one linear layer.

    Every width after the first halves the image. Convolutions start from Kaiming's normal
    distribution (He et al. 2015), and each block's last convolution from zero (Goyal et al. 2017),
    so that the network starts as a shallow one.

    Args:
        in_channels: Channels of an image.
        num_classes: Logits.
        widths: Channels of each stage.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for index, width in enumerate(widths):
            before = widths[max(0, index - 1)]
            blocks.append(ResidualBlock(before, width, stride=1 if index == 0 else 2))
            blocks.append(ResidualBlock(width, width, stride=1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], num_classes),
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.head(self.blocks(self.stem(images_NCHW)))
        return logits
