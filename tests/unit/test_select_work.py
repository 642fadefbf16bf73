"""Two tiny runs: compared on the validation split, timed, decided, and one of them registered."""

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    QuantizeConfig,
    RegistryConfig,
    SelectConfig,
    TrainConfig,
)
from rayloop.data.versions import read_split
from rayloop.errors import Corrupt, GateRefused, WorkError
from rayloop.quantize.cpu import cpu_features
from rayloop.quantize.result import LatencyPoint, QuantizeResult
from rayloop.quantize.work import quantize_run
from rayloop.registry.store import open_registry
from rayloop.select.candidate import Candidate
from rayloop.select.comparison import Comparison, conclude, known_floor, save_comparison
from rayloop.select.final import as_registered, refuse_broken_limits, register_chosen
from rayloop.select.runs import find_runs
from rayloop.select.table import comparison_table
from rayloop.select.work import (
    candidate_settings,
    find_made,
    make_candidate,
    time_candidates,
)
from rayloop.storage import Storage
from rayloop.train.alone import train_alone
from rayloop.train.result import load_result
from tests.datasets import ROWS, write_dataset

CONFIG = Config(
    data=DataConfig(name="thirds"),
    model=ModelConfig(widths=(4, 8)),
    train=TrainConfig(
        epochs=6, global_batch_size=22, norm_group_rows=11, num_workers=1, precision="fp32",
        floor_epochs=1, augment=AugmentConfig(translate_px=0),
    ),
    quantize=QuantizeConfig(
        max_accuracy_drop=0.2, min_agreement=0.7, seconds_per_point=0.01, batch_sizes=(1, 32)
    ),
    registry=RegistryConfig(min_margin_over_linear=-1.0),
)  # fmt: skip
WIDTHS = {"narrow": (4, 8), "wide": (8, 24)}
SETTINGS = candidate_settings(CONFIG.quantize)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two runs that were compared."""
    root = tmp_path_factory.mktemp("root")
    storage = Storage(str(root))
    dataset = write_dataset(storage)
    splits = {name: read_split(storage, dataset, name) for name in ("train", "val")}
    for name, widths in WIDTHS.items():
        config = replace(CONFIG, run_id=name, model=ModelConfig(widths=widths))
        train_alone(config, storage, dataset, splits, lambda _: None)
        make_candidate(storage, name, SETTINGS, SYSTEM_CLOCK)
    return root


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Storage:
    shutil.copytree(template, tmp_path / "root")
    return Storage(str(tmp_path / "root"))


def made_of(storage: Storage, name: str) -> QuantizeResult:
    made = find_made(storage, load_result(storage, name), SETTINGS, cpu_features())
    assert made is not None
    return made


def compare(storage: Storage, **section: object) -> Comparison:
    config = replace(CONFIG, select=SelectConfig(**section))  # type: ignore[arg-type]
    found = find_runs(storage, config)
    made = [made_of(storage, run.run_id) for run in found.runs]
    images = read_split(storage, found.dataset, "val").images
    timings = time_candidates(storage, made, images, config.quantize, SYSTEM_CLOCK)
    return conclude(storage, config, found, made, timings, 0.5, SYSTEM_CLOCK)


def by_name(comparison: Comparison) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in comparison.candidates}


def test_candidates_are_compared_on_the_validation_split_alone(storage: Storage) -> None:
    made = made_of(storage, "narrow")
    assert (made.split, made.test_rows) == ("val", ROWS["val"])
    assert not storage.exists("runs/narrow/quantize")
    comparison = compare(storage)
    names = ["narrow/fp32", "narrow/int8", "wide/fp32", "wide/int8"]
    assert sorted(by_name(comparison)) == names
    times = [candidate.latency_ms_b1 for candidate in comparison.candidates]
    assert times == sorted(times) and times[0] > 0
    assert comparison.rows == ROWS["val"]
    for name, candidate in by_name(comparison).items():
        if name.endswith("int8"):
            assert candidate.refused == ""
            assert candidate.right.mean() == pytest.approx(candidate.accuracy)
        else:
            assert "INT8 is what is registered" in candidate.refused
    assert {candidate.method for candidate in comparison.front} == {"int8_static"}
    assert load_result(storage, "narrow").test_accuracy is None


def test_what_was_made_before_is_found_only_where_it_would_be_the_same(storage: Storage) -> None:
    run, features = load_result(storage, "narrow"), cpu_features()
    assert find_made(storage, run, SETTINGS, features) is not None
    assert find_made(storage, run, SETTINGS, ("sparc",)) is None
    assert find_made(storage, replace(run, checkpoint_digest="0"), SETTINGS, features) is None
    assert find_made(storage, replace(run, dataset_digest="0"), SETTINGS, features) is None
    assert find_made(storage, run, replace(SETTINGS, min_agreement=0.8), features) is None
    assert find_made(storage, run, SETTINGS, features, split="test") is None
    assert find_made(storage, replace(run, run_id="none"), SETTINGS, features) is None
    storage.write("runs/narrow/candidate/int8_static.onnx", b"other")
    assert find_made(storage, run, SETTINGS, features) is None


def test_a_file_that_changed_after_it_was_compared_is_not_timed(storage: Storage) -> None:
    made = made_of(storage, "narrow")
    storage.write("runs/narrow/candidate/fp32.onnx", b"other")
    images = read_split(storage, find_runs(storage, CONFIG).dataset, "val").images
    with pytest.raises(Corrupt, match="--remeasure"):
        time_candidates(storage, [made], images, CONFIG.quantize, SYSTEM_CLOCK)


def test_each_model_keeps_its_quietest_pass(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = iter([4.0, 1.0, 9.0, 2.0, 3.0] * 2)

    def measure(sessions, images, size, seconds, clock):  # type: ignore[no-untyped-def]
        assert seconds == CONFIG.quantize.seconds_per_point / 5
        ms = next(busy)
        return {
            name: LatencyPoint(batch_size=size, calls=9, median_ms=ms * (i + 1), p99_ms=ms,
                               spread=0.0, images_per_second=1000 / ms)
            for i, name in enumerate(sessions)
        }  # fmt: skip

    monkeypatch.setattr("rayloop.select.work.measure_latency", measure)
    images = read_split(storage, find_runs(storage, CONFIG).dataset, "val").images
    made = made_of(storage, "narrow")
    timings = time_candidates(storage, [made], images, CONFIG.quantize, SYSTEM_CLOCK)
    one, many = timings["narrow/int8"]
    assert (one.batch_size, one.median_ms, one.p99_ms, one.spread) == (1, 2.0, 1.0, 8.0)
    assert (many.batch_size, many.images_per_second) == (32, 1000.0)


def test_record_and_picture_are_written_and_the_floor_is_known_again(storage: Storage) -> None:
    comparison = compare(storage, prefer="bytes", max_bytes=10**9)
    found = find_runs(storage, CONFIG)
    assert known_floor(storage, CONFIG, found) is None
    save_comparison(storage, "select/thirds-v1", comparison)
    record = storage.read_json("select/thirds-v1/select.json")
    assert record["chosen"] == "narrow/int8"
    assert len(record["candidates"]) == 4 and "right" not in record["candidates"][0]
    assert [row["name"] for row in record["candidates"] if row["on_front"]] == [
        candidate.name for candidate in comparison.front
    ]
    assert known_floor(storage, CONFIG, found) == 0.5
    other = replace(CONFIG, train=replace(CONFIG.train, seed=1))
    assert known_floor(storage, other, found) is None
    png = Image.open(io.BytesIO(storage.read("select/thirds-v1/select.png")))
    assert png.size[0] >= 1400
    summary = comparison.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary["chosen"]) == {
        "name", "run_id", "accuracy", "latency_ms_b1", "images_per_second", "size_bytes",
    }  # fmt: skip
    assert summary["candidates"] == 4
    assert summary["constraints"] == {
        "max_latency_ms": None, "min_accuracy": None, "max_bytes": 10**9, "prefer": "bytes",
    }  # fmt: skip


def test_a_comparison_without_a_choice_is_drawn_and_told(storage: Storage) -> None:
    comparison = compare(storage, max_bytes=1)
    save_comparison(storage, "select/none", comparison)
    assert storage.read_json("select/none/select.json")["chosen"] is None
    assert comparison.summary()["chosen"] is None
    with pytest.raises(WorkError, match=r"narrow/int8 comes nearest .* is in here\."):
        comparison.choice("here")


def test_the_table_fits_80_columns_and_marks_the_choice(storage: Storage) -> None:
    comparison = compare(storage, prefer="bytes")
    text = io.StringIO()
    Console(file=text, width=80).print(comparison_table(comparison))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (chosen,) = [line for line in lines if line.rstrip(" │").endswith("chosen")]
    assert "narrow/int8" in chosen
    assert sum("compared" in line for line in lines) == 2
    long = replace(comparison.candidates[0], name=f"{'long-name-' * 6}/fp32")
    many = [replace(long, name=f"{long.name}{i}") for i in range(50)]
    text = io.StringIO()
    crowd = replace(comparison, candidates=(*comparison.candidates, *many))
    Console(file=text, width=80).print(comparison_table(crowd))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    assert "24 more are in the record" in text.getvalue()


def quantizer(storage: Storage, config: Config):  # type: ignore[no-untyped-def]
    def quantize(run_id: str) -> QuantizeResult:
        *_, last = quantize_run(storage, config.quantize, run_id, SYSTEM_CLOCK)
        assert isinstance(last, QuantizeResult)
        return last

    return quantize


def test_the_chosen_one_is_tested_quantized_again_and_registered(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayloop.train.floor.MIN_STEPS", 50)
    chosen = compare(storage, prefer="bytes").choice("here")
    line = register_chosen(
        storage, CONFIG, chosen, cpu_features(), quantizer(storage, CONFIG), SYSTEM_CLOCK
    )
    assert (line["model"], line["version"], line["alias"]) == ("classifier", "1", "champion")
    assert line["gate"] == "pass"
    run = load_result(storage, "narrow")
    assert line["test_accuracy_fp32"] == run.test_accuracy is not None
    assert line["floor_accuracy"] == run.floor_accuracy is not None
    registered = open_registry(storage, CONFIG.registry, SYSTEM_CLOCK).versions("classifier")[0]
    content = storage.read("runs/narrow/candidate/int8_static.onnx")
    assert registered.artifact_digest == hashlib.sha256(content).hexdigest()
    assert load_result(storage, "wide").test_accuracy is None

    def refuse(run_id: str) -> QuantizeResult:
        raise AssertionError(f"{run_id} was quantized again")

    again = register_chosen(storage, CONFIG, chosen, cpu_features(), refuse, SYSTEM_CLOCK)
    assert again == line
    strict = replace(CONFIG, registry=RegistryConfig(min_margin_over_linear=1.0))
    with pytest.raises(GateRefused) as caught:
        register_chosen(storage, strict, chosen, cpu_features(), refuse, SYSTEM_CLOCK)
    told = str(caught.value)
    assert "narrow/int8 was chosen on the validation split, and the test split refuses it" in told
    assert "registry.min_margin_over_linear=1.0" in told


def test_another_file_than_the_compared_one_must_meet_the_limits_itself(storage: Storage) -> None:
    chosen = compare(storage, prefer="bytes").choice("here")
    final = quantizer(storage, CONFIG)("narrow")
    assert as_registered(storage, chosen, final) is chosen
    rows = [
        replace(row, sha256="0", size_bytes=999_999, excluded_layers=("first",))
        if row.name == final.chosen else row for row in final.methods
    ]  # fmt: skip
    other = as_registered(storage, chosen, replace(final, methods=tuple(rows)))
    assert other.size_bytes == 999_999
    refuse_broken_limits(SelectConfig(max_bytes=10**6), chosen, other)
    limit = SelectConfig(max_bytes=100_000)
    with pytest.raises(GateRefused, match=r"met --max-bytes 100000 with .*has 999,999 bytes"):
        refuse_broken_limits(limit, chosen, other)
