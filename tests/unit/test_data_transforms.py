"""Augmentation: uint8 in and out, decided by seed, step and row alone, nothing when all is off."""

from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayloop.config import AugmentConfig
from rayloop.data.transforms import Choices, alternating_flip, augment, choose

OFF = AugmentConfig(flip=False, translate_px=0)
ALL = AugmentConfig(flip=True, translate_px=2, erase_share=0.5, color_jitter=0.4)
COUNT = 8


def pixels(channels: int = 3, side: int = 6) -> Tensor:
    """A batch of random uint8 images."""
    random = np.random.default_rng(5)
    values = random.integers(0, 256, (COUNT, side, side, channels), dtype=np.uint8)
    return torch.from_numpy(values)


def chosen(
    config: AugmentConfig, step: int = 3, seed: int = 1, stripe: slice = slice(None), epoch: int = 0
) -> Choices:
    """Choices of a global batch of rows 0, 1, 2, ..."""
    rows: npt.NDArray[np.int64] = np.arange(COUNT)
    return choose(config, seed, step, rows, np.full(COUNT, epoch), stripe)


def only(**changes: npt.NDArray[np.generic]) -> Choices:
    """Choices that do nothing but what is given."""
    nothing = chosen(OFF)
    values = {field.name: getattr(nothing, field.name) for field in fields(Choices)}
    return Choices(**{**values, **changes})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", [OFF, ALL, AugmentConfig(erase_share=1.0)])
def test_shape_and_type_stay_and_the_input_is_untouched(
    channels: int, config: AugmentConfig
) -> None:
    images = pixels(channels)
    before = images.clone()
    changed = augment(images, chosen(config), config)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(images, before)


def test_nothing_changes_when_all_is_off() -> None:
    images = pixels()
    assert torch.equal(augment(images, chosen(OFF), OFF), images)


def test_the_same_step_gives_the_same_images_and_another_step_or_seed_others() -> None:
    images = pixels()
    once, again, later, other = (
        augment(images, chosen(ALL, step, seed), ALL)
        for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2))
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, later)
    assert not torch.equal(once, other)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_workers_does_not_matter(world_size: int) -> None:
    images, size = pixels(), COUNT // world_size
    stripes = [slice(rank * size, (rank + 1) * size) for rank in range(world_size)]
    parts = [augment(images[part], chosen(ALL, stripe=part), ALL) for part in stripes]
    assert torch.equal(torch.cat(parts), augment(images, chosen(ALL), ALL))


@given(st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_a_row_is_flipped_in_every_other_epoch(seed: int, epoch: int) -> None:
    rows: npt.NDArray[np.int64] = np.arange(200)
    now, then = (alternating_flip(rows, np.full(200, e), seed) for e in (epoch, epoch + 1))
    assert np.array_equal(now, ~then)
    assert 0.25 < now.mean() < 0.75


def test_a_flip_mirrors_left_to_right() -> None:
    images = pixels()
    flip = np.arange(COUNT) % 2 == 0
    changed = augment(images, only(flip=flip), OFF)
    assert torch.equal(changed[0], images[0].flip(1))
    assert torch.equal(changed[1], images[1])


@pytest.mark.parametrize("shift", [(0, 1), (2, -2), (-5, 5), (13, -40)])
def test_a_shift_is_a_crop_of_the_reflected_image(shift: tuple[int, int]) -> None:
    images = pixels()
    changed = augment(images, only(shift=np.tile(np.array(shift), (COUNT, 1))), OFF)
    padded = np.pad(images.numpy(), ((0, 0), (40, 40), (40, 40), (0, 0)), mode="reflect")
    top, left = 40 + shift[0], 40 + shift[1]
    assert np.array_equal(changed.numpy(), padded[:, top : top + 6, left : left + 6])


def test_an_image_of_one_pixel_can_be_shifted() -> None:
    config = AugmentConfig(translate_px=3)
    images = pixels(side=1)
    assert torch.equal(augment(images, chosen(config), config), images)


@given(st.integers(0, 10_000))
def test_the_erased_rectangle_lies_in_the_image(step: int) -> None:
    top, left, height, width = chosen(AugmentConfig(erase_share=1.0), step).erase.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1 + 1e-9).all()
    assert (left + width <= 1 + 1e-9).all()
    assert (height * width >= 0.05 - 1e-9).all()
    assert (height * width <= 0.25 + 1e-9).all()


def test_erasing_paints_one_colour_in_one_rectangle() -> None:
    config = AugmentConfig(flip=False, translate_px=0, erase_share=1.0)
    erase = np.tile([0.5, 0.0, 0.5, 1.0], (COUNT, 1))
    erase[0, 2] = 0.0
    images, paint = pixels(), np.full((COUNT, 3), [7, 8, 9], np.uint8)
    changed = augment(images, only(erase=erase, paint=paint), config)
    assert torch.equal(changed[0], images[0])
    assert torch.equal(changed[1, :3], images[1, :3])
    assert (changed[1, 3:] == torch.tensor([7, 8, 9])).all()


def test_the_share_of_erased_images_is_the_configured_one() -> None:
    rows: npt.NDArray[np.int64] = np.arange(4000)
    config = AugmentConfig(erase_share=0.25)
    erase = choose(config, 0, 0, rows, np.zeros_like(rows), slice(None)).erase
    assert 0.22 < (erase[:, 2] > 0).mean() < 0.28


def test_jitter_scales_brightness_and_leaves_grey_images_alone() -> None:
    config = AugmentConfig(flip=False, translate_px=0, color_jitter=0.5)
    factors = np.tile(np.array([0.5, 1.0, 1.0], np.float32), (COUNT, 1))
    images = pixels()
    darker = augment(images, only(jitter=factors), config)
    assert (darker.int() - images.int() / 2).abs().max() <= 1
    grey = pixels(channels=1)
    assert torch.equal(augment(grey, only(jitter=factors), config), grey)
