"""Which evidence the release gates let through."""

from dataclasses import replace

import pytest

from rayloop.registry.gates import Evidence, Failed, Passed, judge, reasons_of, to_records

GOOD = Evidence(
    run_id="r1",
    quantize_gate="pass",
    chosen="int8_static",
    accuracy=0.91,
    floor_accuracy=0.84,
    min_margin=0.03,
    trained_digests=("checkpoint-a", "data-a"),
    quantized_digests=("checkpoint-a", "data-a"),
)


def test_good_evidence_passes_every_gate() -> None:
    """Also when the margin is met exactly."""
    assert judge(GOOD) == (Passed("int8"), Passed("linear_floor"), Passed("lineage"))
    assert not reasons_of(judge(replace(GOOD, accuracy=0.87)))


@pytest.mark.parametrize(
    ("change", "gate", "words"),
    [
        ({"accuracy": 0.869}, "linear_floor", "0.8690 is below 0.8700"),
        ({"floor_accuracy": None}, "linear_floor", "--train.floor_epochs"),
        ({"accuracy": float("nan")}, "linear_floor", "below"),
        ({"chosen": "", "quantize_gate": "too wrong"}, "int8", "too wrong"),
        ({"quantized_digests": ("checkpoint-b", "data-a")}, "lineage", "checkpoint-b"),
        ({"quantized_digests": ("checkpoint-a", "data-b")}, "lineage", "dataset digest"),
    ],
)
def test_each_weakness_is_refused_with_its_reason(
    change: dict[str, object], gate: str, words: str
) -> None:
    """Exactly one gate fails, and its reason names the values or the remedy."""
    verdicts = judge(replace(GOOD, **change))  # type: ignore[arg-type]
    failed = [verdict for verdict in verdicts if isinstance(verdict, Failed)]
    assert [verdict.name for verdict in failed] == [gate]
    assert words in reasons_of(verdicts)[0]


def test_records_hold_every_gate() -> None:
    """Passed ones too, so that a release shows what was asked."""
    records = to_records(judge(replace(GOOD, floor_accuracy=None)))
    assert [(record["name"], record["passed"]) for record in records] == [
        ("int8", True),
        ("linear_floor", False),
        ("lineage", True),
    ]
