"""Train settings -> an optimizer, and a learning rate for every step."""

import math

import torch
from torch import nn

from rayloop.config import TrainConfig
from rayloop.train.muon import Muon


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer; weight decay only for matrices and filters, not biases and norms.

    With Muon the filters do not decay either, since it keeps their norm. The first convolution,
    whose input has few channels, is left to AdamW.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    exempt = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    rate = peak_learning_rate(config)
    if config.optimizer == "muon":
        filters = [p for p in decayed if p.ndim == 4][1:]
        others = [p for p in decayed if all(p is not chosen for chosen in filters)]
        return Muon(filters, [{**groups[0], "params": others}, groups[1]], rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)


def peak_learning_rate(config: TrainConfig) -> float:
    """The highest rate of the run: the configured one, scaled to the batch size by its rule."""
    growth = config.global_batch_size / config.reference_batch_size
    factor = {"constant": 1.0, "linear": growth, "sqrt": math.sqrt(growth)}
    return config.learning_rate * factor[config.learning_rate_rule]


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """A linear climb over the warm-up, then a fall to `final_rate_share` of the peak.

    A function of the step alone: a resumed run needs no schedule state (cosine decay after
    Loshchilov and Hutter 2017, "SGDR").
    """
    peak = peak_learning_rate(config)
    warmup_steps = round(config.warmup_share * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    falling = 1 - progress
    if config.schedule == "cosine":
        falling = (1 + math.cos(math.pi * progress)) / 2
    floor = config.final_rate_share
    return peak * (floor + (1 - floor) * falling)
