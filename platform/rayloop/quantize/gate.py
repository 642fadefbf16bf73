"""A quantized model's figures beside fp32's -> pass, or the reasons for refusing it."""

from rayloop.config import QuantizeConfig

EPSILON = 1e-9
"""Shares are quotients of row counts; equality must not be lost to their last bit."""


def refusals(
    config: QuantizeConfig, fp32_accuracy: float, accuracy: float, agreement: float
) -> list[str]:
    """Why a quantized model may not replace fp32; empty when it may.

    Args:
        config: Holds the limits.
        fp32_accuracy: Share (0..1) of the rows that fp32 gets right.
        accuracy: The same of the quantized model.
        agreement: Share (0..1) of the rows on which both choose the same class.
    """
    reasons = []
    drop = fp32_accuracy - accuracy
    if not drop <= config.max_accuracy_drop + EPSILON:
        reasons.append(
            f"accuracy {accuracy:.4f} is {drop:.4f} below fp32's {fp32_accuracy:.4f}; "
            f"quantize.max_accuracy_drop={config.max_accuracy_drop} is the most it may lose"
        )
    if not agreement >= config.min_agreement - EPSILON:
        reasons.append(
            f"it chooses fp32's class on {agreement:.4f} of the rows; "
            f"quantize.min_agreement={config.min_agreement} is the least"
        )
    return reasons
