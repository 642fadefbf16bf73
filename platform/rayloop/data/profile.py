"""Simple statistics of images -> histograms that add up across shards: the reference for drift."""

from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BINS = 32
UPPER_EDGES = {"brightness": 1.0, "contrast": 0.5, "sharpness": 0.5, "saturation": 1.0}
"""Upper edge of each statistic's histogram; the lower one is 0. Fixed, so that counts add up."""

Statistics = dict[str, npt.NDArray[np.float32]]


def image_statistics(images: npt.NDArray[np.uint8]) -> Statistics:
    """Per image, on the scale 0..1, shape (N,) each.

    Args:
        images: uint8, shape (N, H, W, C).

    Returns:
        `brightness` (mean), `contrast` (standard deviation), `sharpness` (mean absolute difference
        of neighbours), and for colour images `saturation` (mean of max minus min channel).
    """
    scaled = images.astype(np.float32) / 255
    grey = scaled.mean(axis=3)
    found = {
        "brightness": grey.mean(axis=(1, 2)),
        "contrast": grey.std(axis=(1, 2)),
        "sharpness": (
            np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2))
            + np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
        )
        / 2,
    }
    if images.shape[3] == 3:
        found["saturation"] = (scaled.max(axis=3) - scaled.min(axis=3)).mean(axis=(1, 2))
    return found


def histogram(images: npt.NDArray[np.uint8]) -> dict[str, list[int]]:
    """Counts per bin of each statistic; values above the last edge fall into the last bin."""
    counts = {}
    for name, values in image_statistics(images).items():
        upper = UPPER_EDGES[name]
        bins = np.minimum((values / upper * NUM_BINS).astype(int), NUM_BINS - 1)
        counts[name] = np.bincount(bins, minlength=NUM_BINS).tolist()
    return counts


def merge(parts: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Add the histograms of several shards into one profile with its edges."""
    names = parts[0] if parts else {}
    return {
        name: {
            "edges": np.linspace(0, UPPER_EDGES[name], NUM_BINS + 1).tolist(),
            "counts": np.sum([part[name] for part in parts], axis=0).tolist(),
        }
        for name in names
    }
