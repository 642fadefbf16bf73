"""The report is whole, self-contained and says what the evidence says."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayloop.data.versions import DatasetVersion
from rayloop.pipeline.pictures import grid_png, speed_front
from rayloop.pipeline.report import Evidence, half_width, write_report
from rayloop.quantize.result import LatencyPoint, MethodRow, Mistake, QuantizeResult
from rayloop.registry.release import ReleaseRecord
from rayloop.train.result import TrainResult

NAMES = ("cat", "dog & <wolf>")
SECTIONS = ["stages", "samples", "curves", "confusion", "mistakes", "quantization", "latency",
            "served", "data", "lineage"]  # fmt: skip
PICTURES = ["loss, accuracy and learning rate by epoch", "confusion matrix",
            "latency against batch size", "accuracy against latency",
            "latency histogram"]  # fmt: skip
EMPTY_TAGS = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """What a browser would find: balanced tags, ids, pictures by what they show, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.ids: list[str] = []
        self.images: dict[str, str] = {}
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag not in EMPTY_TAGS:
            self.open.append(tag)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.addresses += [named[key] or "" for key in ("src", "srcset", "href") if key in named]
        if tag == "img":
            self.images[named["alt"] or ""] = named["src"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def method(name: str, accuracy: float, size_bytes: int, ms: float) -> MethodRow:
    points = tuple(LatencyPoint(batch_size=size, calls=3, median_ms=ms * size, p99_ms=ms * size,
                                spread=0.0, images_per_second=1000 / ms)
                   for size in (1, 32))  # fmt: skip
    return MethodRow(
        name=name, file=f"{name}.onnx", sha256=name * 4, size_bytes=size_bytes, accuracy=accuracy,
        agreement=0.995, max_probability_change=0.1, mean_total_variation=0.0,
        class_accuracy={"cat": accuracy, NAMES[1]: accuracy}, worst_class_drop=0.0,
        batch_difference=0.0, latency=points,
    )  # fmt: skip


def trained() -> TrainResult:
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "train_accuracy": 0.5,
                "val_accuracy": 0.5, "learning_rate": 0.1} for e in (1.0, 2.0)]  # fmt: skip
    return TrainResult(
        run_id="run-7", checkpoint="c", checkpoint_digest="d" * 64, model_name="fastnet",
        num_parameters=1234, dataset_name="pets", dataset_version="v1", dataset_digest="e" * 64,
        class_names=NAMES, shape=(4, 6, 1), pixel_mean=(0.5,), pixel_std=(0.5,),
        val_accuracy=0.9, test_accuracy=0.9, floor_accuracy=0.625, steps=2, images_per_second=1.0,
        data_wait_share=0.0, mfu=None, goodput=1.0, step_ms={}, seconds=1.0, precision="fp32",
        feed="resident", num_workers=1, resumed_at_step=0, history=history, config_digest="f" * 64,
    )  # fmt: skip


def quantized() -> QuantizeResult:
    rows = (method("fp32", 0.9125, 4_000_000, 1.0), method("int8_static", 0.9075, 1_040_000, 0.4),
            method("int8_dynamic", 0.9, 3_900_000, 1.1))  # fmt: skip
    return QuantizeResult(
        run_id="run-7", model_name="fastnet", checkpoint_digest="d" * 64, dataset_name="pets",
        dataset_version="v1", dataset_digest="e" * 64, class_names=NAMES, shape=(4, 6, 1),
        test_rows=400, calibration_rows=64, methods=rows, chosen="int8_static", gate="pass",
        attempts=(), sensitivity=(), size_ratio=0.26, speedup_b1=2.5, speedup_b32=2.5,
        overhead_bytes=1, confusion=((180, 20), (17, 183)),
        mistakes=(Mistake(row_id=5, label=0, predicted=1, confidence=0.987),), num_threads=1,
        cpu_features=("x86_64", "avx2"), reduce_range=True, packages={"onnx": "1.2"}, config={},
        created_at="2026-01-01T00:00:00Z", seconds=1.0,
    )  # fmt: skip


def released() -> ReleaseRecord:
    return ReleaseRecord(
        model="classifier", version="3", created_at="2026-01-01T00:00:00Z", artifact="model.onnx",
        artifact_digest="a" * 64, method="int8_static", class_names=NAMES, shape=(4, 6, 1),
        run_id="run-7", checkpoint_digest="d" * 64, dataset={"name": "pets"}, config_digest="f",
        config={}, metrics={}, gates=(), profile={}, golden={}, cpu_features=("x86_64",),
        reduce_range=True, packages={},
    )  # fmt: skip


def evidence(**changes: Any) -> Evidence:
    dataset = DatasetVersion(
        name="pets", version="v1", digest="e" * 64, parent="", created_at="2026-01-01T00:00:00Z",
        class_names=NAMES, shape=(4, 6, 1), splits={"test": 400, "train": 1700},
        class_counts={"train": {"cat": 801, NAMES[1]: 899}, "test": {"cat": 200, NAMES[1]: 200}},
        profile={}, pixel_mean=(0.5,), pixel_std=(0.5,), refused={"wrong shape": 13},
    )  # fmt: skip
    images = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6, 1)
    served = {"served_accuracy": 0.905, "served_requests": 1200, "failed_requests": 0,
              "p50_ms": 2.0, "p99_ms": 9.0, "latencies_ms": [1.0, 2.0, 2.5, 9.0]}  # fmt: skip
    whole = Evidence(
        train=trained(), dataset=dataset, quantized=quantized(), release=released(), served=served,
        summary={"run_id": "run-7"}, originals=images, augmented=np.stack([images] * 2),
        mistake_images=images[:1], seconds_by_stage={"prepare data": 2.5, "train": 7.5},
    )  # fmt: skip
    return replace(whole, **changes)


def read(path: Path, given_evidence: Evidence) -> Page:
    write_report(path, given_evidence)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a turn in which everything went well."""
    return read(tmp_path_factory.mktemp("report") / "sub" / "report.html", evidence())


def test_every_section_is_there_in_order(whole: Page) -> None:
    assert whole.ids == ["verdict", *SECTIONS]


@pytest.mark.parametrize("alt", PICTURES)
def test_every_picture_can_be_opened_and_is_not_blank(whole: Page, alt: str) -> None:
    content = base64.b64decode(whole.images[alt].removeprefix("data:image/png;base64,"))
    low, high = Image.open(io.BytesIO(content)).convert("L").getextrema()
    assert low < 100 and high == 255


def test_nothing_outside_the_file_is_asked_for(whole: Page) -> None:
    assert whole.addresses
    assert all(address.startswith("data:image/png;base64,") for address in whole.addresses)


def test_nothing_is_named_by_address(whole: Page) -> None:
    html = whole.html
    assert not re.search(
        r"https?:|//|url\(|@import|<script|<link", re.sub(r"base64,[^\"]*", "", html)
    )
    assert len(html) < 3_000_000


@pytest.mark.parametrize(
    "said",
    [
        "fp32 accuracy 91.25 %", "INT8 accuracy 90.75 %", "passes the gate; -0.50 points",
        "linear floor 62.50 %", "0.260×", "4.00 MB → 1.04 MB", "2.50×", "served accuracy 90.50 %",
        "failed requests 0 of 1,200", "latency p50 2 ms", "latency p99 9 ms", "took 10.0 s",
        "classifier version 3", "cat → dog & <wolf> 98.7 %", "wrong shape 13 rows",
        "dog & <wolf> 899 200", "all 1,700 400", "latency: int8_static, fp32.", "7 bits",
    ],
)  # fmt: skip
def test_the_figures_are_those_of_the_evidence(whole: Page, said: str) -> None:
    assert said in whole.text


def test_the_record_and_all_digests_are_told(whole: Page) -> None:
    for digest in ("d" * 64, "e" * 64, "f" * 64, released().digest):
        assert digest in whole.text


def test_a_refused_model_that_was_not_served_is_told_as_such(tmp_path: Path) -> None:
    attempt = {"excluded": ["conv1"], "accuracy": 0.8, "agreement": 0.9, "reasons": ["too low"]}
    refused = replace(
        quantized(), chosen="", gate="accuracy is too low", attempts=(attempt, attempt), mistakes=()
    )
    page = read(
        tmp_path / "r.html",
        evidence(
            quantized=refused, served=None, release=None,
            mistake_images=np.zeros((0, 4, 6, 1), np.uint8),
            train=replace(trained(), history=[], floor_accuracy=None),
        ),
    )  # fmt: skip
    for said in ("refused by the gate", "Gate: accuracy is too low", "not registered", "conv1",
                 "was not served", "Every test row was answered right", "No epoch was finished",
                 "no linear floor"):  # fmt: skip
        assert said in page.text
    assert page.ids == ["verdict", *SECTIONS]


def test_a_round_in_which_every_request_failed_has_no_histogram(tmp_path: Path) -> None:
    served = {"served_accuracy": 0.0, "served_requests": 4, "failed_requests": 4,
              "p50_ms": float("nan"), "p99_ms": float("nan"), "latencies_ms": []}  # fmt: skip
    page = read(tmp_path / "r.html", evidence(served=served))
    assert "No request was answered" in page.text and "failed requests 4 of 4" in page.text
    assert "latency histogram" not in page.images


def test_pictures_must_match_what_they_are_pictures_of() -> None:
    with pytest.raises(ValueError, match=r"2 images for 1 mistakes"):
        evidence(mistake_images=np.zeros((2, 4, 6, 1), np.uint8))
    with pytest.raises(ValueError, match=r"give \(R, 3, 4, 6, 1\)"):
        evidence(augmented=np.zeros((2, 3, 4, 4, 1), np.uint8))


def test_a_grid_keeps_every_pixel_and_leaves_gaps_open() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    grid = np.asarray(Image.open(io.BytesIO(grid_png(rows, cell_px=8, gap_px=2))))
    assert grid.shape == (2 * 8 + 2, 3 * 10 + 2 * 2, 4)
    np.testing.assert_array_equal(grid[10:18:2, 24:34:2, :3], rows[1, 2])
    assert (grid[8:10, :, 3] == 0).all() and (grid[:, 10:12, 3] == 0).all()


def test_the_front_names_the_methods_nobody_beats_the_fastest_first() -> None:
    rows = [method(*row) for row in (("slow", 0.95, 1, 9.0), ("best", 0.95, 1, 3.0),
                                     ("fast", 0.9, 1, 1.0), ("bad", 0.89, 1, 2.0))]  # fmt: skip
    assert speed_front(rows) == ["fast", "best"]


def test_the_interval_is_wilsons() -> None:
    """Known values: 90 of 100 gives 0.8256 to 0.9448; a share of 1 still has a width."""
    assert half_width(0.9, 100) == pytest.approx((0.9448 - 0.8256) / 2, abs=1e-4)
    assert half_width(1.0, 100) == pytest.approx(0.0185, abs=1e-4)
