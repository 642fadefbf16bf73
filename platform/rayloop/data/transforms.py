"""Training images -> augmented training images, in batches of uint8 on the device.

Every random choice is a function of (seed, step, place in the global batch) or of (seed, row,
epoch), never of a stream of random numbers, so that it does not matter how many workers share the
step or where a run was resumed. Evaluation has no transforms.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayloop.config import AugmentConfig

STREAM = 0x617567
"""Keeps these random numbers apart from those of the sample order."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What is done to each image of a batch, shape (N,) each unless said otherwise.

    Attributes:
        flip: Mirror left to right.
        shift: Rows and columns to shift by, shape (N, 2).
        erase: Top, left, height, width of the erased rectangle in shares of the image, shape
            (N, 4); height 0 where nothing is erased.
        paint: Colour of the rectangle, shape (N, 3), 0..255.
        jitter: Factors for brightness, contrast and saturation, shape (N, 3).
    """

    flip: npt.NDArray[np.bool_]
    shift: npt.NDArray[np.int64]
    erase: npt.NDArray[np.float64]
    paint: npt.NDArray[np.uint8]
    jitter: npt.NDArray[np.float32]


def choose(
    config: AugmentConfig,
    seed: int,
    step: int,
    rows: npt.NDArray[np.int64],
    epochs: npt.NDArray[np.int64],
    stripe: slice,
) -> Choices:
    """Draw the choices of a whole global batch and keep one rank's stripe of them.

    Args:
        config: What may happen.
        seed: The run's seed.
        step: The global step.
        rows: Row ids of the global batch, shape (G,).
        epochs: Epoch of each row, shape (G,).
        stripe: The rank's part.
    """
    count = len(rows)
    random = np.random.Generator(np.random.Philox(key=[seed ^ (STREAM << 32), step]))
    shift = random.integers(-config.translate_px, config.translate_px + 1, (count, 2))
    area, top, left = random.uniform(0.05, 0.25, count), random.random(count), random.random(count)
    aspect = np.exp(random.uniform(np.log(0.5), np.log(2.0), count))
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    height = np.where(random.random(count) < config.erase_share, height, 0.0)
    erase = np.stack([top * (1 - height), left * (1 - width), height, width], axis=1)
    paint = random.integers(0, 256, (count, 3), dtype=np.uint8)
    spread = config.color_jitter
    jitter = random.uniform(1 - spread, 1 + spread, (count, 3)).astype(np.float32)
    return Choices(
        flip=(alternating_flip(rows, epochs, seed) & config.flip)[stripe],
        shift=shift[stripe],
        erase=erase[stripe],
        paint=paint[stripe],
        jitter=jitter[stripe],
    )


def alternating_flip(
    rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.bool_]:
    """Which rows are mirrored: each in every other epoch, its first by chance (Jordan 2024)."""
    mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    coin = (mixed >> np.uint64(40)) & np.uint64(1)
    flips: npt.NDArray[np.bool_] = (coin.astype(np.int64) + epochs) % 2 == 1
    return flips


def augment(images_NHWC: Tensor, choices: Choices, config: AugmentConfig) -> Tensor:
    """Apply the choices to uint8 images (N, H, W, C); gives a new uint8 tensor of that shape."""
    moved = _shift_and_flip(images_NHWC, choices)
    if config.color_jitter > 0 and moved.shape[3] == 3:
        moved = _jitter(moved, choices)
    if config.erase_share > 0:
        _erase_in_place(moved, choices)
    return moved


def _shift_and_flip(images: Tensor, choices: Choices) -> Tensor:
    """One gather: source row and column of every target pixel, reflected at the borders."""
    count, height, width, _ = images.shape
    rows = _reflect(np.arange(height) + choices.shift[:, :1], height)
    columns = _reflect(np.arange(width) + choices.shift[:, 1:], width)
    columns = np.where(choices.flip[:, None], columns[:, ::-1], columns)
    index = rows[:, :, None] * width + columns[:, None, :]
    index += (np.arange(count) * (height * width))[:, None, None]
    flat = images.reshape(count * height * width, -1)
    picked = flat.index_select(0, torch.from_numpy(index.reshape(-1)).to(images.device))
    return picked.reshape(images.shape)


def _reflect(position: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Fold positions outside [0, size) back inside, the border row not repeated."""
    period = max(1, 2 * (size - 1))
    folded = np.abs(position) % period
    inside: npt.NDArray[np.int64] = np.minimum(folded, period - folded)
    return inside


def _jitter(images: Tensor, choices: Choices) -> Tensor:
    """Scale brightness, then contrast around the mean, then saturation around grey."""
    factors = torch.from_numpy(choices.jitter).to(images.device)[:, :, None, None, None]
    pixels = images.float() * factors[:, 0]
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * factors[:, 1]
    grey = pixels.mean(dim=3, keepdim=True)
    pixels = grey + (pixels - grey) * factors[:, 2]
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _erase_in_place(images: Tensor, choices: Choices) -> None:
    height, width = images.shape[1:3]
    size = np.array([height, width, height, width])
    for index in np.flatnonzero(choices.erase[:, 2]):
        top, left, tall, wide = np.rint(choices.erase[index] * size).astype(int)
        color = torch.from_numpy(choices.paint[index, : images.shape[3]].copy())
        images[index, top : top + tall, left : left + wide] = color.to(images.device)
