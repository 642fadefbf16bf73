"""A quantized run that passes every gate -> a published release and an alias that points to it."""

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayloop.clock import Clock, iso_utc
from rayloop.config import Config, RegistryConfig
from rayloop.data.versions import open_version
from rayloop.errors import Corrupt, GateRefused
from rayloop.logs import stage_logger
from rayloop.quantize.result import QuantizeResult, load_quantize_result, quantize_folder
from rayloop.registry.gates import Evidence, Verdict, judge, reasons_of, to_records
from rayloop.registry.release import (
    ARTIFACT_FILE,
    GOLDEN_FILE,
    RECORD_FILE,
    ReleaseRecord,
    load_release,
)
from rayloop.registry.store import open_registry
from rayloop.storage import Storage
from rayloop.train.result import TrainResult, load_result

log = stage_logger("registry")


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """What registering gave.

    Attributes:
        release: The version's record.
        alias: The alias that points to it.
        created: False when the same artifact was registered before and its version is used.
    """

    release: ReleaseRecord
    alias: str
    created: bool

    def summary(self) -> dict[str, Any]:
        """The last line of jobs/register.py."""
        return {
            "model": self.release.model,
            "version": self.release.version,
            "alias": self.alias,
            "digest": self.release.digest,
            "gate": "pass",
            "created": self.created,
            "run_id": self.release.run_id,
            "metrics": self.release.metrics,
        }


def register(storage: Storage, config: Config, clock: Clock) -> Registered:
    """Judge a quantized run, publish its release, then move the alias.

    The same artifact registered twice stays one version.

    Args:
        storage: The root everything lives under.
        config: `run_id` names the run, empty the newest; the registry section says what is needed.
        clock: Stamps the release.

    Raises:
        DataMissing: The run is not there or not quantized.
        GateRefused: The evidence does not pass, with every reason.
        Corrupt: A file of the run does not match its recorded digest.
    """
    trained = load_result(storage, config.run_id)
    quantized = load_quantize_result(storage, trained.run_id)
    verdicts = judge(gather(trained, quantized, config.registry))
    reasons = reasons_of(verdicts)
    if reasons:
        raise GateRefused(f"Run {trained.run_id} is not registered: {'; '.join(reasons)}.")
    registry = open_registry(storage, config.registry, clock)
    model, method = config.registry.model, quantized.method(quantized.chosen)
    version = registry.reserve(
        model,
        method.sha256,
        storage.path(quantize_folder(trained.run_id)),
        trained.mlflow_run_id,
    )
    created = not registry.is_published(model, version)
    if created:
        release = compose(storage, config, trained, quantized, verdicts, version, clock)
        publish(storage, release, quantized)
        registry.tag(model, version, tags_of(release))
    else:
        release = load_release(storage, model, version)
        log.info("this artifact is %s version %s already; only the alias moves", model, version)
    registry.move_alias(model, config.registry.alias, version)
    log.info("%s version %s is @%s", model, version, config.registry.alias)
    return Registered(release=release, alias=config.registry.alias, created=created)


def gather(trained: TrainResult, quantized: QuantizeResult, config: RegistryConfig) -> Evidence:
    """What the gates look at, out of the two results."""
    name = quantized.chosen or quantized.methods[0].name
    return Evidence(
        run_id=trained.run_id,
        quantize_gate=quantized.gate,
        chosen=quantized.chosen,
        accuracy=quantized.method(name).accuracy,
        floor_accuracy=trained.floor_accuracy,
        min_margin=config.min_margin_over_linear,
        trained_digests=(trained.checkpoint_digest, trained.dataset_digest),
        quantized_digests=(quantized.checkpoint_digest, quantized.dataset_digest),
    )


def compose(
    storage: Storage,
    config: Config,
    trained: TrainResult,
    quantized: QuantizeResult,
    verdicts: tuple[Verdict, ...],
    version: str,
    clock: Clock,
) -> ReleaseRecord:
    """The record of a release that is about to be published."""
    dataset = open_version(storage, trained.dataset_name, trained.dataset_version)
    golden = storage.read(f"{quantize_folder(trained.run_id)}/{GOLDEN_FILE}")
    with np.load(io.BytesIO(golden)) as arrays:
        golden_rows = len(arrays["images"])
    return ReleaseRecord(
        model=config.registry.model,
        version=version,
        created_at=iso_utc(clock.now()),
        artifact=ARTIFACT_FILE,
        artifact_digest=quantized.method(quantized.chosen).sha256,
        method=quantized.chosen,
        class_names=trained.class_names,
        shape=trained.shape,
        run_id=trained.run_id,
        checkpoint_digest=trained.checkpoint_digest,
        dataset={"name": dataset.name, "version": dataset.version, "digest": dataset.digest},
        config_digest=trained.config_digest,
        config=trained.config,
        metrics=metrics_of(trained, quantized),
        gates=to_records(verdicts),
        profile=dataset.profile,
        golden={
            "file": GOLDEN_FILE,
            "rows": golden_rows,
            "digest": hashlib.sha256(golden).hexdigest(),
        },
        cpu_features=quantized.cpu_features,
        reduce_range=quantized.reduce_range,
        packages=quantized.packages,
    )


def metrics_of(trained: TrainResult, quantized: QuantizeResult) -> dict[str, float]:
    """The figures a release carries: shares in 0..1, bytes, and ratios to fp32."""
    fp32, chosen = quantized.methods[0], quantized.method(quantized.chosen)
    metrics = {
        "val_accuracy": trained.val_accuracy,
        "test_accuracy_fp32": fp32.accuracy,
        "test_accuracy_int8": chosen.accuracy,
        "agreement": chosen.agreement,
        "worst_class_drop": chosen.worst_class_drop,
        "size_bytes": float(chosen.size_bytes),
        "size_ratio": quantized.size_ratio,
        "speedup_b1": quantized.speedup_b1,
        "speedup_b32": quantized.speedup_b32,
    }
    if trained.floor_accuracy is not None:
        metrics["floor_accuracy"] = trained.floor_accuracy
    return metrics


def publish(storage: Storage, release: ReleaseRecord, quantized: QuantizeResult) -> None:
    """Make a release's files visible in one step, after checking the model's bytes.

    Raises:
        Corrupt: The model file of the run is not the one that was judged.
    """
    folder, method = quantize_folder(release.run_id), quantized.method(release.method)
    artifact = storage.read(f"{folder}/{method.file}")
    found = hashlib.sha256(artifact).hexdigest()
    if found != release.artifact_digest:
        raise Corrupt(
            f"{storage.path(folder, method.file)} has digest {found[:12]}, and the one that passed "
            f"the gate had {release.artifact_digest[:12]}. Quantize run {release.run_id} again."
        )
    with tempfile.TemporaryDirectory() as staged:
        local = Storage(staged)
        local.write(release.artifact, artifact)
        local.write(GOLDEN_FILE, storage.read(f"{folder}/{GOLDEN_FILE}"))
        local.write_json(RECORD_FILE, release.to_json())
        storage.publish(Path(staged), release.folder)


def tags_of(release: ReleaseRecord) -> dict[str, str]:
    """What a table of versions shows, as texts."""
    return {
        "gate": "pass",
        "method": release.method,
        "run_id": release.run_id,
        "dataset": f"{release.dataset['name']}:{release.dataset['version']}",
        "created_at": release.created_at,
        "digest": release.digest,
        "accuracy": f"{release.metrics['test_accuracy_int8']:.4f}",
        "size_bytes": f"{release.metrics['size_bytes']:.0f}",
    }
