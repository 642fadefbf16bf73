"""Runs with evidence become versions; aliases move; damage is found. A real SQLite database."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import Config, RegistryConfig
from rayloop.data.versions import DatasetVersion, write_manifest
from rayloop.errors import ConfigError, Corrupt, DataMissing, GateRefused, RequestError
from rayloop.quantize.result import LatencyPoint, MethodRow, QuantizeResult, quantize_folder
from rayloop.registry.register import register
from rayloop.registry.release import ReleaseRecord, load_release
from rayloop.registry.store import Registry, open_registry
from rayloop.storage import Storage
from rayloop.tracking import Tracker, flatten
from rayloop.tracking_client import tracking_uri_of
from rayloop.train.result import TrainResult, save_result

NAMES = ("cat", "dog")
DIGEST = "e" * 64


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose database is set up; setting one up takes seconds."""
    root = tmp_path_factory.mktemp("template")
    open_registry(Storage(str(root)), RegistryConfig(), SYSTEM_CLOCK)
    return root


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Storage:
    """A fresh root with a database."""
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    return Storage(str(tmp_path))


@pytest.fixture
def registry(storage: Storage) -> Registry:
    """The registry of the fresh root."""
    return open_registry(storage, RegistryConfig(), SYSTEM_CLOCK)


def method(name: str, content: bytes) -> MethodRow:
    """A row of the comparison for a file of these bytes."""
    points = tuple(LatencyPoint(batch_size=size, calls=3, median_ms=1.0, p99_ms=1.0, spread=0.0,
                                images_per_second=size * 1000.0) for size in (1, 32))  # fmt: skip
    return MethodRow(
        name=name, file=f"{name}.onnx", sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content), accuracy=0.9, agreement=1.0, max_probability_change=0.0,
        mean_total_variation=0.0, class_accuracy={"cat": 0.9}, worst_class_drop=0.0,
        batch_difference=0.0, latency=points,
    )  # fmt: skip


def add_run(
    storage: Storage, run_id: str, content: bytes = b"model", floor: float | None = 0.5
) -> str:
    """Write the records and files of a trained and quantized run; gives its id."""
    dataset = DatasetVersion(
        name="pets", version="v1", digest=DIGEST, parent="", created_at="2026-01-01T00:00:00Z",
        class_names=NAMES, shape=(4, 4, 1), splits={"train": 2}, class_counts={},
        profile={"mean": [1, 2]}, pixel_mean=(0.5,), pixel_std=(0.5,),
    )  # fmt: skip
    write_manifest(storage, dataset)
    trained = TrainResult(
        run_id=run_id, checkpoint="c", checkpoint_digest="d" * 64, model_name="fastnet",
        num_parameters=1, dataset_name="pets", dataset_version="v1", dataset_digest=DIGEST,
        class_names=NAMES, shape=(4, 4, 1), pixel_mean=(0.5,), pixel_std=(0.5,),
        val_accuracy=0.9, test_accuracy=0.9, floor_accuracy=floor, steps=1, images_per_second=1.0,
        data_wait_share=0.0, mfu=None, goodput=1.0, step_ms={}, seconds=1.0, precision="fp32",
        feed="resident", num_workers=1, resumed_at_step=0, config={"seed": 0}, config_digest="f",
    )  # fmt: skip
    save_result(storage, trained)
    rows = (method("fp32", b"large model"), method("int8_static", content))
    quantized = QuantizeResult(
        run_id=run_id, model_name="fastnet", checkpoint_digest="d" * 64, dataset_name="pets",
        dataset_version="v1", dataset_digest=DIGEST, class_names=NAMES, shape=(4, 4, 1),
        test_rows=2, calibration_rows=2, methods=rows, chosen="int8_static", gate="pass",
        attempts=(), sensitivity=(), size_ratio=0.4, speedup_b1=2.0, speedup_b32=2.0,
        overhead_bytes=1, confusion=((1, 0), (0, 1)), mistakes=(), num_threads=1,
        cpu_features=("x86_64",), reduce_range=True, packages={}, config={},
        created_at="2026-01-01T00:00:00Z", seconds=1.0,
    )  # fmt: skip
    folder = quantize_folder(run_id)
    storage.write_json(f"{folder}/result.json", quantized.to_json())
    storage.write(f"{folder}/int8_static.onnx", content)
    golden = io.BytesIO()
    np.savez(golden, images=np.zeros((3, 4, 4, 1), np.uint8), probabilities=np.ones((3, 2)))
    storage.write(f"{folder}/golden.npz", golden.getvalue())
    return run_id


def registered(storage: Storage, run_id: str, content: bytes, alias: str = "champion") -> str:
    """Add a run and register it; gives the version."""
    add_run(storage, run_id, content)
    config = Config(run_id=run_id, registry=RegistryConfig(alias=alias))  # type: ignore[arg-type]
    return register(storage, config, SYSTEM_CLOCK).release.version


def test_a_run_becomes_the_champion_with_its_evidence(storage: Storage, registry: Registry) -> None:
    """The release is whole, verified, and found by every kind of reference."""
    add_run(storage, "r1")
    outcome = register(storage, Config(), SYSTEM_CLOCK)
    assert outcome.created
    assert {"model", "version", "alias", "digest", "gate"} <= set(outcome.summary())
    release = load_release(storage, "classifier", "1")
    assert release == outcome.release
    assert release.dataset == {"name": "pets", "version": "v1", "digest": DIGEST}
    assert release.profile == {"mean": [1, 2]}
    assert release.golden["rows"] == 3
    assert release.metrics["floor_accuracy"] == 0.5
    assert all(gate["passed"] for gate in release.gates)
    for ref in ("", "@champion", ":1", "1"):
        assert registry.resolve("classifier", ref) == "1"
    (version,) = registry.versions("classifier")
    assert (version.version, version.aliases) == ("1", ("champion",))
    assert registry.models() == ["classifier"]


def test_the_same_artifact_stays_one_version(storage: Storage, registry: Registry) -> None:
    """Registering again only moves the alias, and says so."""
    add_run(storage, "r1")
    register(storage, Config(), SYSTEM_CLOCK)
    again = register(storage, Config(registry=RegistryConfig(alias="shadow")), SYSTEM_CLOCK)
    assert not again.created and again.release.version == "1"
    assert registry.aliases("classifier") == {"champion": "1", "shadow": "1"}


def test_nothing_is_registered_without_a_passed_gate(storage: Storage, registry: Registry) -> None:
    """A missing floor leaves no version, no folder and no alias."""
    add_run(storage, "r1", floor=None)
    with pytest.raises(GateRefused, match=r"floor_epochs"):
        register(storage, Config(), SYSTEM_CLOCK)
    assert registry.models() == [] and not storage.exists("models")


def test_promote_and_rollback(storage: Storage, registry: Registry) -> None:
    """The old champion becomes previous, and comes back once."""
    registered(storage, "r1", b"one")
    assert registered(storage, "r2", b"two", "challenger") == "2"
    assert registry.promote("classifier") == "2"
    assert registry.aliases("classifier") == {"champion": "2", "previous": "1"}
    with pytest.raises(DataMissing, match="'challenger'"):
        registry.promote("classifier")
    assert registry.rollback("classifier") == "1"
    assert registry.aliases("classifier") == {"champion": "1"}
    bad = registry.versions("classifier")[1]
    assert bad.aliases == () and "rolled_back_at" in bad.tags
    with pytest.raises(DataMissing, match="'previous'"):
        registry.rollback("classifier")


def test_a_new_champion_makes_the_old_one_previous(storage: Storage, registry: Registry) -> None:
    """Also when it is registered as champion at once."""
    registered(storage, "r1", b"one")
    registered(storage, "r2", b"two")
    assert registry.aliases("classifier") == {"champion": "2", "previous": "1"}


def test_a_version_without_files_is_not_seen_and_is_completed(
    storage: Storage, registry: Registry
) -> None:
    """As left by a process that died between the database and the files."""
    digest = hashlib.sha256(b"model").hexdigest()
    assert registry.reserve("classifier", digest, "somewhere", "") == "1"
    assert registry.versions("classifier") == []
    with pytest.raises(DataMissing):
        registry.move_alias("classifier", "champion", "1")
    add_run(storage, "r1")
    assert register(storage, Config(), SYSTEM_CLOCK).release.version == "1"
    assert len(registry.versions("classifier")) == 1


def test_files_the_database_does_not_know_are_not_overwritten(
    storage: Storage, registry: Registry
) -> None:
    """A lost database must not cost a release."""
    storage.write_json("models/classifier/1/release.json", {"old": True})
    add_run(storage, "r1")
    with pytest.raises(RequestError, match=r"mlflow\.db"):
        register(storage, Config(), SYSTEM_CLOCK)
    assert storage.read_json("models/classifier/1/release.json") == {"old": True}


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_changed_file_is_not_believed(storage: Storage, name: str) -> None:
    """One byte more, and the release is refused."""
    registered(storage, "r1", b"one")
    path = f"models/classifier/1/{name}"
    storage.write(path, storage.read(path) + b"x")
    with pytest.raises(Corrupt, match=name):
        load_release(storage, "classifier", "1")


def test_a_changed_record_is_not_believed(storage: Storage) -> None:
    """The record's digest covers every field."""
    registered(storage, "r1", b"one")
    fields = storage.read_json("models/classifier/1/release.json")
    assert ReleaseRecord.from_json(json.loads(json.dumps(fields))).version == "1"
    fields["metrics"]["test_accuracy_int8"] = 1.0
    with pytest.raises(Corrupt, match="its own"):
        ReleaseRecord.from_json(fields)


def test_an_artifact_other_than_the_judged_one_is_refused(storage: Storage) -> None:
    """The file that is published is the one that passed the gate."""
    add_run(storage, "r1")
    storage.write(f"{quantize_folder('r1')}/int8_static.onnx", b"other")
    with pytest.raises(Corrupt, match="Quantize run r1 again"):
        register(storage, Config(), SYSTEM_CLOCK)
    assert not storage.exists("models/classifier/1")


def test_missing_models_and_versions_say_what_there_is(
    storage: Storage, registry: Registry
) -> None:
    """Messages list versions and the remedy."""
    with pytest.raises(DataMissing, match=r"jobs/register\.py"):
        registry.resolve("classifier")
    registered(storage, "r1", b"one")
    with pytest.raises(DataMissing, match="versions 1 and aliases @champion -> 1"):
        registry.resolve("classifier", ":7")
    with pytest.raises(DataMissing, match="there are 1"):
        load_release(storage, "classifier", "7")


def test_a_resumed_run_is_the_same_tracked_run(storage: Storage) -> None:
    """Metrics that are no finite numbers are left out; nothing is written to the folder."""
    tracker = Tracker(storage)
    settings = {"train": {"epochs": 2}, "seed": 0}
    first = tracker.start_run("r1", settings, {"dataset": "x"})
    tracker.log_metrics(first, {"loss": 0.5, "mfu": None, "bad": float("nan")}, step=3)
    tracker.finish(first)
    assert Tracker(storage).start_run("r1", settings) == first
    assert Tracker(storage).start_run("r2", settings) != first
    run = tracker._client.get_run(first)
    assert run.data.metrics == {"loss": 0.5}
    assert run.data.params == {"train.epochs": "2", "seed": "0"}
    assert run.info.status == "RUNNING"


def test_settings_are_flattened_and_remote_roots_need_a_server() -> None:
    """Names are joined by dots; a database cannot lie in an object store."""
    assert flatten({"a": {"b": {"c": 1}}, "d": "x"}) == {"a.b.c": "1", "d": "x"}
    remote = Storage.__new__(Storage)
    remote.root, remote.is_local = "s3://bucket", False
    assert tracking_uri_of(remote, "http://server") == "http://server"
    with pytest.raises(ConfigError, match="tracking_uri"):
        tracking_uri_of(remote, "")
