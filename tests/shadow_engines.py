"""Engines for shadows that behave, crash, hang and talk nonsense."""

import os
import time

import numpy as np


class Engine:
    """Probabilities [N, 2] from the first pixel: 255 is surely class 0."""

    def __init__(self, manner: str, after: int) -> None:
        self.manner, self.after = manner, after

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Behave until `after` calls are over, then misbehave."""
        self.after -= 1
        first = images[:, 0, 0, 0].astype(np.float32) / 255
        answers = np.stack([first, 1 - first], 1)
        if self.after >= 0 or self.manner == "well":
            return answers
        if self.manner == "crash":
            os.abort()
        if self.manner == "raise":
            raise ValueError("no")
        if self.manner == "hang":
            time.sleep(3600)
        if self.manner == "shape":
            return answers[:, :1]
        if self.manner == "other":
            return answers[:, ::-1]
        return np.full_like(answers, np.nan)


def make(manner: str, after: int) -> Engine:
    """What a shadow's process calls; some never get ready."""
    if manner == "never":
        time.sleep(3600)
    if manner == "no-engine":
        raise RuntimeError("the file is damaged")
    print("noise on standard output must not reach the parent")
    return Engine(manner, after)
