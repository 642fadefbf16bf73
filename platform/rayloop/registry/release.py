"""One release as a record with its evidence, and its files, believed only when digests match."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from rayloop.errors import Corrupt, DataMissing
from rayloop.storage import Storage

ARTIFACT_FILE, GOLDEN_FILE, RECORD_FILE = "model.onnx", "golden.npz", "release.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseRecord:
    """Everything a server or an auditor must know about one model version.

    Attributes:
        model: Name in the registry.
        version: An integer as text.
        created_at: ISO 8601, UTC.
        artifact: File name of the model beside the record.
        artifact_digest: SHA-256 of its bytes.
        method: How it was made, e.g. `int8_static`.
        class_names: Label names in index order.
        shape: Height, width, channels.
        run_id: The training run.
        checkpoint_digest: Digest of the weights.
        dataset: `name`, `version` and `digest`.
        config_digest: Digest of all settings.
        config: All settings.
        metrics: Accuracies (0..1), bytes, ratios.
        gates: One entry a gate: `name`, `passed`, `reasons`.
        profile: Reference profile of the training split, for drift.
        golden: `file`, `rows`, `digest`; the file holds images and their probabilities.
        cpu_features: Architecture and INT8 instruction sets of the machine that made it.
        reduce_range: Whether INT8 weights have 7 bits.
        packages: Versions of what made it.
    """

    model: str
    version: str
    created_at: str
    artifact: str
    artifact_digest: str
    method: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    run_id: str
    checkpoint_digest: str
    dataset: dict[str, str]
    config_digest: str
    config: dict[str, Any]
    metrics: dict[str, float]
    gates: tuple[dict[str, Any], ...]
    profile: dict[str, Any]
    golden: dict[str, Any]
    cpu_features: tuple[str, ...]
    reduce_range: bool
    packages: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the record as canonical JSON: sorted keys, no spaces."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Where its files lie, relative to the storage root."""
        return release_folder(self.model, self.version)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, with the record's own digest."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**plain, "digest": self.digest}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReleaseRecord":
        """The inverse of `to_json`.

        Raises:
            Corrupt: A field is missing or unknown, or the digest does not match.
        """
        plain = dict(fields)
        recorded = plain.pop("digest", "")
        try:
            for name in ("class_names", "shape", "gates", "cpu_features"):
                plain[name] = tuple(plain[name])
            record = cls(**plain)
        except (KeyError, TypeError) as error:
            raise Corrupt(
                f"The release record of {fields.get('model')}:{fields.get('version')} cannot be "
                f"read ({error}); register the model again."
            ) from None
        if record.digest != recorded:
            raise Corrupt(
                f"The release record of {record.model}:{record.version} does not match its own "
                f"digest {recorded[:12]}: it was changed. Register the model again."
            )
        return record


def release_folder(model: str, version: str) -> str:
    """Where a version's files lie, relative to the storage root."""
    return f"models/{model}/{version}"


def read_record(storage: Storage, model: str, version: str) -> ReleaseRecord:
    """A version's record alone, its digest verified.

    Raises:
        DataMissing: There is no such release.
        Corrupt: The record was changed.
    """
    path = f"{release_folder(model, version)}/{RECORD_FILE}"
    if not storage.exists(path):
        known = storage.names(f"models/{model}")
        raise DataMissing(
            f"There is no release {model}:{version} under {storage.path('models')}; there are "
            f"{', '.join(known) or 'none'}. Register one: python jobs/register.py PRESET"
        )
    return ReleaseRecord.from_json(storage.read_json(path))


def load_release(storage: Storage, model: str, version: str) -> ReleaseRecord:
    """A version's record, after the digests of all its files were verified.

    Args:
        storage: The root everything lives under.
        model: Name in the registry.
        version: Exact version, an integer as text.

    Raises:
        DataMissing: There is no such release, or one of its files is gone.
        Corrupt: The record or a file does not match its digest.
    """
    record = read_record(storage, model, version)
    for name, digest in (
        (record.artifact, record.artifact_digest),
        (str(record.golden["file"]), str(record.golden["digest"])),
    ):
        path = f"{record.folder}/{name}"
        found = hashlib.sha256(storage.read(path)).hexdigest()
        if found != digest:
            raise Corrupt(
                f"{storage.path(path)} has digest {found[:12]}, its release record says "
                f"{digest[:12]}: the file was changed or cut short. Put the original back, or "
                f"register the run {record.run_id} as a new version."
            )
    return record
