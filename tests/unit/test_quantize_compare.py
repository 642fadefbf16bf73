"""Figures of the comparison, and the gate that reads them."""

import numpy as np
import pytest

from rayloop.config import QuantizeConfig
from rayloop.quantize import compare, methods
from rayloop.quantize.gate import refusals

LABELS = np.array([0, 1, 1, 2])
ANSWERS = np.array(
    [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]], dtype=np.float32
)


def test_accuracy_by_class_and_confusion() -> None:
    """Rows 2 and 3 are wrong; class names without rows are left out."""
    assert compare.accuracy(ANSWERS, LABELS) == 0.5
    names = ("a", "b", "c", "unseen")
    assert compare.class_accuracy(ANSWERS, LABELS, names) == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert compare.confusion(ANSWERS, LABELS, 3) == ((1, 0, 0), (1, 1, 0), (1, 0, 0))


def test_worst_mistakes_are_the_most_confident_ones() -> None:
    """Ordered by confidence, with the rows' own ids, cut to the count."""
    found = compare.worst_mistakes(ANSWERS, LABELS, np.array([10, 11, 12, 13]), 5)
    assert [entry.row_id for entry in found] == [13, 12]
    assert (found[0].label, found[0].predicted) == (2, 0)
    assert found[0].confidence == pytest.approx(0.8)
    assert len(compare.worst_mistakes(ANSWERS, LABELS, np.arange(4), 1)) == 1


def test_agreement_and_total_variation() -> None:
    """Equal answers agree fully; opposite certainties are at distance 1."""
    first, second = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]
    assert compare.agreement(first, first) == 1.0
    assert compare.agreement(first, second) == 0.0
    assert methods.total_variation(first, first) == 0.0
    assert methods.total_variation(first, second) == 1.0


def test_gate_passes_at_its_limits_and_refuses_past_them() -> None:
    """Both limits are inclusive, and both reasons are told with their values."""
    config = QuantizeConfig(max_accuracy_drop=0.01, min_agreement=0.98)
    assert refusals(config, 0.90, 0.89, 0.98) == []
    assert refusals(config, 0.90, 0.95, 1.0) == []
    reasons = refusals(config, 0.90, 0.88, 0.97)
    assert len(reasons) == 2
    assert "0.8800" in reasons[0] and "max_accuracy_drop=0.01" in reasons[0]
    assert "0.9700" in reasons[1] and "min_agreement=0.98" in reasons[1]
    assert refusals(config, 0.9, float("nan"), 1.0)


def test_calibration_rows_are_spread_and_repeatable() -> None:
    """First and last row are among them; fewer rows than wanted means all of them."""
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    chosen = methods.calibration_rows(images, 10)[:, 0, 0, 0]
    assert len(chosen) == 10 and chosen[0] == 0 and chosen[-1] == 99
    assert len(methods.calibration_rows(images, 1000)) == 100
