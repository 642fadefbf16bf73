"""Settings and a run id -> a run that is ours to start or to go on with, or the difference."""

import uuid
from typing import Any

from rayloop.clock import Clock
from rayloop.config import Config, digest_of, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.errors import ConfigError
from rayloop.logs import stage_logger
from rayloop.storage import Storage

log = stage_logger("train")

OPERATIONAL = frozenset(
    {
        "checkpoint_cost_share", "checkpoint_every_epochs", "compile", "cpus_per_worker",
        "eval_batch_size", "floor_epochs", "keep_checkpoints", "max_failures", "micro_batch_size",
        "min_workers", "num_workers", "step_timeout_s", "test_flip", "use_gpu",
    }
)  # fmt: skip
"""Train settings that say how the work is done and not what is trained: they may change between
the sessions of a run. Another number of workers changes sums in their last bits only."""
DECIDING_WITH_PLAIN_NORM = frozenset({"micro_batch_size", "num_workers", "min_workers"})
"""Without ghost norms these decide which rows share statistics."""


def new_run_id(config: Config, clock: Clock) -> str:
    """A name nobody has: model, dataset, seconds and a little chance."""
    stamp = f"{int(clock.now()):x}"
    return f"{config.model.name}-{config.data.dataset_name}-{stamp}-{uuid.uuid4().hex[:4]}"


def deciding_settings(config: Config) -> dict[str, Any]:
    """The model and train settings that decide what is trained, as plain values."""
    free = OPERATIONAL
    if config.train.norm_group_rows == 0:
        free -= DECIDING_WITH_PLAIN_NORM
    train = {name: value for name, value in to_dict(config.train).items() if name not in free}
    return {"model": to_dict(config.model), "train": train}


def run_digest(config: Config) -> str:
    """Digest of the settings that decide what is trained; the data has its own."""
    return digest_of(deciding_settings(config))


def claim_run(config: Config, dataset: DatasetVersion, storage: Storage) -> None:
    """Write the run's settings, or refuse a run id that belongs to other settings or data.

    Raises:
        ConfigError: Names the first few differences.
    """
    if storage.exists(f"runs/{config.run_id}/sweep.json"):
        raise ConfigError(
            f"Run {config.run_id!r} is a sweep; go on with it by jobs/tune.py, or use another "
            "--run-id."
        )
    path = f"runs/{config.run_id}/config.json"
    mine = {**to_dict(config), "dataset_digest": dataset.digest}
    if not storage.exists(path):
        storage.write_json(path, mine)
        return
    theirs = storage.read_json(path)
    wanted = {**deciding_settings(config), "dataset_digest": dataset.digest}
    differences = [
        line
        for name, value in wanted.items()
        for line in _differences(name, _only(theirs.get(name), value), value)
    ]
    if differences:
        raise ConfigError(
            f"Run {config.run_id!r} exists with other settings: {'; '.join(differences[:5])}. "
            "Use the same settings to continue it, or another --run-id."
        )
    for change in _differences("train", theirs.get("train"), mine["train"]):
        log.info("run %s goes on with other means: %s", config.run_id, change)


def _only(theirs: Any, mine: Any) -> Any:
    """Those of the stored settings that are compared."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return {name: theirs.get(name) for name in mine}
    return theirs


def _differences(name: str, theirs: Any, mine: Any) -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted({*theirs, *mine})
        return [
            d for key in keys for d in _differences(f"{name}.{key}", theirs.get(key), mine.get(key))
        ]
    return [] if theirs == mine else [f"{name} was {theirs}, now {mine}"]
