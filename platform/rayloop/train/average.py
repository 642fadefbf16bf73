"""The weights of every step -> their exponential moving average, a second model."""

import copy

import torch

from rayloop.models.classifier import ImageClassifier


class WeightAverage:
    """An average of a model's weights and norm statistics over the steps.

    The decay grows from 0.1 to its final value as (1 + step) / (10 + step), so that the first
    weights, which mean nothing, are forgotten soon (the warm-up of TensorFlow's and timm's EMA).
    It is a function of the step, so a resumed run needs the averaged weights alone.

    Args:
        model: The trained model, before it is wrapped or compiled.
        decay: Final decay, 0..1.
    """

    def __init__(self, model: ImageClassifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        theirs, mine = model.state_dict(keep_vars=True), self.model.state_dict(keep_vars=True)
        names = [name for name, value in theirs.items() if value.is_floating_point()]
        self._averaged = [mine[name] for name in names]
        self._current = [theirs[name] for name in names]
        self._copied = [(mine[name], theirs[name]) for name in theirs if name not in set(names)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._current, weight)
        for mine, theirs in self._copied:
            mine.copy_(theirs)
