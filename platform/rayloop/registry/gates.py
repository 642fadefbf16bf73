"""The evidence of a training run and its quantization -> passed, or failed with reasons."""

from dataclasses import dataclass
from typing import Any

EPSILON = 1e-9
"""Shares are quotients of row counts; equality must not be lost to their last bit."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A gate that lets the model through."""

    name: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A gate that refuses the model, and why."""

    name: str
    reasons: tuple[str, ...]


Verdict = Passed | Failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the gates look at.

    Attributes:
        run_id: The run, for messages.
        quantize_gate: `pass`, or why quantization refused every INT8 model.
        chosen: The method that passed it, or empty.
        accuracy: Accuracy (0..1) of the chosen model on the test split.
        floor_accuracy: The linear model's on the same split; None when it was not trained.
        min_margin: Accuracy by which the floor must be beaten.
        trained_digests: Checkpoint and dataset digest according to training.
        quantized_digests: The same according to quantization.
    """

    run_id: str
    quantize_gate: str
    chosen: str
    accuracy: float
    floor_accuracy: float | None
    min_margin: float
    trained_digests: tuple[str, str]
    quantized_digests: tuple[str, str]


def judge(evidence: Evidence) -> tuple[Verdict, ...]:
    """Every gate's verdict, in a fixed order."""
    return (
        _verdict("int8", _int8_reasons(evidence)),
        _verdict("linear_floor", _floor_reasons(evidence)),
        _verdict("lineage", _lineage_reasons(evidence)),
    )


def reasons_of(verdicts: tuple[Verdict, ...]) -> list[str]:
    """Why a model is refused; empty when every gate passed."""
    return [
        f"{verdict.name}: {reason}"
        for verdict in verdicts
        if isinstance(verdict, Failed)
        for reason in verdict.reasons
    ]


def to_records(verdicts: tuple[Verdict, ...]) -> tuple[dict[str, Any], ...]:
    """The verdicts as a release record holds them."""
    return tuple(
        {
            "name": verdict.name,
            "passed": isinstance(verdict, Passed),
            "reasons": list(verdict.reasons) if isinstance(verdict, Failed) else [],
        }
        for verdict in verdicts
    )


def _verdict(name: str, reasons: list[str]) -> Verdict:
    return Failed(name, tuple(reasons)) if reasons else Passed(name)


def _int8_reasons(evidence: Evidence) -> list[str]:
    if evidence.chosen and evidence.quantize_gate == "pass":
        return []
    reason = (
        f"no INT8 model of run {evidence.run_id} passed: {evidence.quantize_gate}; train longer or "
        "quantize with other limits"
    )
    return [reason]


def _floor_reasons(evidence: Evidence) -> list[str]:
    if evidence.floor_accuracy is None:
        return [
            f"run {evidence.run_id} has no linear floor; train with --train.floor_epochs above 0"
        ]
    needed = evidence.floor_accuracy + evidence.min_margin
    if evidence.accuracy >= needed - EPSILON:
        return []
    reason = (
        f"test accuracy {evidence.accuracy:.4f} is below {needed:.4f}, the linear model's "
        f"{evidence.floor_accuracy:.4f} plus registry.min_margin_over_linear="
        f"{evidence.min_margin}; train longer or use a stronger model"
    )
    return [reason]


def _lineage_reasons(evidence: Evidence) -> list[str]:
    names = ("checkpoint", "dataset")
    return [
        f"the {name} digest was {trained[:12]} in training and {quantized[:12]} in quantization; "
        f"quantize run {evidence.run_id} again"
        for name, trained, quantized in zip(
            names, evidence.trained_digests, evidence.quantized_digests, strict=True
        )
        if trained != quantized
    ]
