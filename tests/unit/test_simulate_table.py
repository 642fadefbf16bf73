"""Calibrations from files and runs, and the job that predicts from them."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rayloop.config import Config, SimulateConfig, to_dict
from rayloop.errors import ConfigError, Corrupt, DataMissing
from rayloop.presets import parse_config, smoke
from rayloop.simulate.calibration import Calibration, load_calibration, save_calibration
from rayloop.simulate.measured import LAPTOP
from rayloop.simulate.network import Link
from rayloop.simulate.prediction import Plan, predict
from rayloop.simulate.recorded import calibration_of_run
from rayloop.simulate.table import choose_calibration, simulate
from rayloop.storage import Storage
from rayloop.train.claim import run_digest
from rayloop.train.result import TrainResult, save_result

ROOT = Path(__file__).parents[2]


def config(**values: Any) -> Config:
    return Config(simulate=SimulateConfig(**values))


def record(storage: Storage, **values: Any) -> TrainResult:
    """A finished run of two workers, as small as a record may be."""
    fields = {
        "run_id": "mine", "checkpoint": "runs/mine/checkpoints/step-1", "checkpoint_digest": "",
        "model_name": "fastnet", "num_parameters": 1000, "dataset_name": "d",
        "dataset_version": "v", "dataset_digest": "", "class_names": ("a",), "shape": (8, 8, 1),
        "pixel_mean": (0.0,), "pixel_std": (1.0,), "val_accuracy": 0.9, "test_accuracy": 0.9,
        "floor_accuracy": None, "steps": 100, "images_per_second": 640.0, "data_wait_share": 0.0,
        "mfu": None, "goodput": 0.9, "step_ms": {"p50": 100.0, "p90": 112.816}, "seconds": 20.0,
        "precision": "fp32", "feed": "resident", "num_workers": 2, "resumed_at_step": 0,
        "ledger_s": {"start": 8.0, "restart": 30.0, "checkpoint": 0.5}, "interruptions": 3,
        "checkpoint_ms": 12.5,
        "config": to_dict(smoke()),
    }  # fmt: skip
    result = TrainResult(**fields | values)
    storage.write(f"{result.checkpoint}/state.pt", bytes(4321))
    save_result(storage, result)
    return result


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    save_calibration(LAPTOP, storage, "c.json")
    assert load_calibration(storage, "c.json") == LAPTOP


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"row_s": None}, "row_s=None is no float"),
        ({"row_s": "fast"}, "row_s='fast' is no float"),
        ({"workers": 1.5}, "workers=1.5 is no int"),
        ({"name": 3}, "name=3 is no str"),
        ({"contention": [1, 2]}, "contention=[1, 2] is no list"),
        ({"speed": 1.0}, "unknown are speed"),
        ({"row_s": 0.0}, "row_s=0.0"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"hidden_share": 1.5}, "hidden_share=1.5"),
        ({"node_bytes_per_s": 0}, "node_bytes_per_s=0"),
        ({"contention": []}, "contention=()"),
        ({"contention": [[2, 1.0]]}, "contention=((2, 1.0),)"),
        ({"contention": [[1, 1.0], [4, 0.5]]}, "begin with [1, 1.0]"),
    ],
)
def test_a_bad_calibration_is_refused_with_its_field_and_the_remedy(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("c.json", asdict(LAPTOP) | changes)
    with pytest.raises((Corrupt, ConfigError)) as caught:
        load_calibration(storage, "c.json")
    assert told in str(caught.value)
    assert "python benchmarks/simulator.py" in str(caught.value)


def test_a_calibration_that_lacks_a_field_or_is_no_json_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    values = asdict(LAPTOP)
    del values["noise"]
    storage.write_json("c.json", values)
    with pytest.raises(Corrupt, match="it lacks noise"):
        load_calibration(storage, "c.json")
    storage.write("c.json", b"{")
    with pytest.raises(Corrupt, match="not valid JSON"):
        load_calibration(storage, "c.json")
    with pytest.raises(DataMissing, match=r"other\.json"):
        choose_calibration(SimulateConfig(calibration=str(tmp_path / "other.json")), storage)


def test_contention_is_measured_interpolated_or_grows_with_the_workers() -> None:
    values = {name: getattr(LAPTOP, name) for name in Calibration.__slots__}
    three = Calibration(**values | {"contention": ((1, 1.0), (2, 1.2), (4, 2.4))})
    assert [three.crowding(count) for count in (1, 2, 3, 4, 8)] == [
        1.0, 1.2, pytest.approx(1.8), 2.4, 4.8
    ]  # fmt: skip


def test_workers_beyond_the_cores_wait_for_one_at_each_message() -> None:
    """Of the all-reduce's four turns between four workers."""
    alone = replace(LAPTOP, noise=0.0, platform_cores=0.0)
    calm = replace(alone, cores=4)
    crowded = replace(alone, cores=2, crowded_latency_s=LAPTOP.node_latency_s + 0.001)
    plan = Plan(
        workers=4,
        workers_per_node=4,
        rows=64,
        between=Link(latency_s=0.0, bytes_per_s=1e12),
        run_rows=1e5,
    )
    added_s = predict(plan, crowded).step_s - predict(plan, calm).step_s
    assert added_s == pytest.approx(0.004)
    assert predict(replace(plan, workers=2), crowded).exchange_share == pytest.approx(
        predict(replace(plan, workers=2), calm).exchange_share
    )


def test_workers_that_fill_a_node_wait_for_whom_ray_interrupts() -> None:
    calm = replace(LAPTOP, platform_cores=0.0)
    assert replace(calm, platform_cores=0.1).slowdown(1) == calm.slowdown(1)
    for count in (2, 4):
        busy = replace(calm, platform_cores=0.1).slowdown(count)
        assert busy == pytest.approx(1.1 * calm.slowdown(count))


def test_the_calibration_that_comes_along_is_the_measured_one_and_holds() -> None:
    raw = json.loads((ROOT / "benchmarks" / "simulator_2core_2026-11-22.json").read_text())
    for name, value in raw["calibration"].items():
        ours = getattr(LAPTOP, name)
        if name == "contention":
            assert [f for _, f in ours] == pytest.approx([f for _, f in value], rel=0.01)
        elif name not in ("name", "source"):
            assert ours == pytest.approx(value, rel=0.01), name
    for workers in (1, 2, 4):
        plan = Plan(
            workers=workers, workers_per_node=4, rows=256 / workers,
            between=Link(latency_s=0.0, bytes_per_s=1e12), run_rows=LAPTOP.run_rows,
        )  # fmt: skip
        runs = [run["usual_images_per_second"] for run in raw["runs"] if run["workers"] == workers]
        predicted = predict(plan, LAPTOP).rows_per_s
        assert predicted == pytest.approx(statistics.fmean(runs), rel=0.15)


def test_a_run_tells_its_calibration_which_predicts_that_run_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    result = record(storage)
    told = calibration_of_run(storage)
    assert told == calibration_of_run(storage, "mine")
    assert told.noise == pytest.approx(0.1)
    assert (told.start_s, told.restart_s, told.checkpoint_s) == (8.0, 10.0, 0.0125)
    assert (told.checkpoint_bytes, told.exchange_bytes) == (4321, 8000)
    plan = Plan(
        workers=2, workers_per_node=2, rows=32, between=told.inside(2), run_rows=told.run_rows
    )
    again = predict(plan, told)
    assert again.rows_per_s == pytest.approx(result.images_per_second)
    assert again.steps == result.steps and again.extrapolated == ()


def test_a_run_that_never_restarted_starts_again_as_it_started(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    record(storage, interruptions=0)
    assert calibration_of_run(storage).restart_s == 8.0


def test_a_run_that_measured_no_speed_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    record(storage, images_per_second=0.0)
    with pytest.raises(DataMissing, match=r"'mine' measured no speed.*--simulate\.run"):
        calibration_of_run(storage)
    with pytest.raises(DataMissing, match="no finished run 'none'"):
        calibration_of_run(storage, "none")


def test_without_a_run_the_calibration_that_comes_along_is_used(tmp_path: Path) -> None:
    lines, last = simulate(config(workers=(1, 10_000)), Storage(str(tmp_path)))
    assert last["calibration"] == LAPTOP.name
    assert [plan["workers"] for plan in last["plans"]] == [1, 10_000]
    assert last["plans"][0]["extrapolated"] == () and last["plans"][1]["extrapolated"]
    assert "10,000*" in lines[3] and lines[-1].startswith("* beyond what was measured")
    json.dumps(last, allow_nan=False)


def test_settings_reach_the_plans(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    _, dear = simulate(config(workers=(8,), price_per_worker_hour=3.0, run_rows=1e8), storage)
    _, spot = simulate(
        config(workers=(8,), price_per_worker_hour=3.0, run_rows=1e8, spot=True), storage
    )
    assert dear["plans"][0]["cost_per_hour"] == 24.0
    assert spot["plans"][0]["cost_per_hour"] == pytest.approx(24.0 * 0.35)
    assert spot["plans"][0]["failures"] > 10 * dear["plans"][0]["failures"]
    _, never = simulate(config(workers=(8,), failures_per_worker_day=0.0), storage)
    assert never["plans"][0]["mtbf_s"] is None
    _, strong = simulate(config(workers=(2, 4), keeps="global_batch"), storage)
    assert [plan["global_batch_size"] for plan in strong["plans"]] == [65_536, 65_536]
    few = config(workers=(1000,), keeps="global_batch", global_batch_size=256)
    with pytest.raises(ConfigError, match="less than a row"):
        simulate(few, storage)


def test_a_prediction_changes_no_run() -> None:
    assert run_digest(config(workers=(3,))) == run_digest(Config())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"workers": ()}, "simulate.workers=()"),
        ({"workers": (0,)}, "simulate.workers=(0,)"),
        ({"link_gbit_per_s": 0.0}, "simulate.link_gbit_per_s=0.0"),
        ({"spot_price_share": 1.5}, "simulate.spot_price_share=1.5"),
        ({"failures_per_worker_day": -1.0}, "simulate.failures_per_worker_day=-1.0"),
        ({"stages": 0}, "simulate.stages=0"),
        ({"run": "a", "calibration": "b"}, "exclude each other"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SimulateConfig(**values)
    assert told in str(caught.value)


def test_the_jobs_words() -> None:
    words = ["laptop", "--workers", "8", "64", "--workers-per-node", "8", "--spot",
             "--simulate.link-gbit-per-s", "100", "--run", "mine"]  # fmt: skip
    told = parse_config("a job", words, section="simulate").simulate
    assert told.workers == (8, 64) and told.workers_per_node == 8 and told.spot
    assert told.link_gbit_per_s == 100 and told.run == "mine"


def test_the_job_prints_a_table_and_one_json_line(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "jobs/simulate.py", "laptop", *words],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "RAYLOOP_HOME": str(tmp_path)},
        )  # fmt: skip

    done = run("--workers", "1", "4", "1000")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert len(json.loads(last)["plans"]) == 3
    assert "efficiency" in table[1]
    wrong = run("--calibration", str(tmp_path / "none.json"))
    assert wrong.returncode == 2 and "none.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr
