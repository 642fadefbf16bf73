"""The picture is drawn whatever is compared, and its names can be told apart."""

import io

import numpy as np
import pytest
from PIL import Image

from rayloop.config import SelectConfig
from rayloop.select.candidate import Candidate, front_of, short_names
from rayloop.select.picture import draw_comparison


def candidate(number: int, accuracy: float, refused: str = "") -> Candidate:
    return Candidate(
        name=f"run-{number}/int8", run_id=f"run-{number}",
        method="fp32" if refused == "fp32" else "int8_static", accuracy=accuracy, agreement=1.0,
        latency_ms_b1=0.1 * 1.5**number, latency_ms_p99=1.0, images_per_second=9000 / 1.4**number,
        spread=0.1, size_bytes=1000 * 2**number, refused=refused,
    )  # fmt: skip


CROWD = [candidate(n % 12, 0.6 + 0.01 * (n % 37), "gate" if n % 9 == 0 else "") for n in range(40)]


@pytest.mark.parametrize(
    ("candidates", "limits", "floor"),
    [
        ([candidate(0, 0.9)], {}, None),
        ([candidate(0, 1.0), candidate(1, 1.0, "fp32")], {"min_accuracy": 1.0}, 0.5),
        ([candidate(0, 0.0), candidate(1, 0.0)], {"max_bytes": 1500}, 0.0),
        ([candidate(0, 0.97, "gate"), candidate(0, 0.98, "fp32")], {"max_latency_ms": 0.01}, 0.99),
        (CROWD, {"max_latency_ms": 1e6, "min_accuracy": 0.3, "max_bytes": 4000}, 0.65),
    ],
    ids=["one", "all right", "all wrong", "none able", "crowd"],
)
@pytest.mark.parametrize("with_choice", [True, False])
def test_it_is_drawn_whatever_is_compared(
    candidates: list[Candidate], limits: dict[str, float], floor: float | None, with_choice: bool
) -> None:
    front = front_of([one for one in candidates if not one.refused])
    chosen = front[0] if with_choice and front else None
    png = draw_comparison(
        candidates, front, chosen, SelectConfig(**limits), floor, "pets:v1, 9 rows", "why " * 90
    )
    width, height = Image.open(io.BytesIO(png)).size
    assert 1400 <= width <= 1600 and 650 <= height <= 800


def test_the_choice_shows() -> None:
    candidates = [candidate(0, 0.9), candidate(1, 0.95)]
    without, with_it = (
        draw_comparison(candidates, candidates, chosen, SelectConfig(), None, "t", "w")
        for chosen in (None, candidates[1])
    )
    orange = [
        (np.abs(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
                - (0xE0, 0x82, 0x3D)).sum(axis=2) < 40).sum()
        for png in (without, with_it)
    ]  # fmt: skip
    assert orange[0] == 0 and orange[1] > 200


def test_names_are_short_and_stay_different() -> None:
    sweep = [f"a-long-sweep-7f3a-{i:04d}" for i in range(3)]
    assert list(short_names(sweep).values()) == ["…0000", "…0001", "…0002"]
    assert short_names(["w4", "w16"]) == {"w4": "w4", "w16": "w16"}
    assert short_names(["one-run"]) == {"one-run": "one-run"}
    (label,) = short_names(["fastnet-fashion-mnist-67123abc-ab12"]).values()
    assert label == "…n-mnist-67123abc-ab12"
