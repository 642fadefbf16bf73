"""A version and an input -> the plan of a batch prediction, and what of it is done already.

`predictions/NAME/plan.json` says what the folder belongs to and is written first;
`rows/part-NNNNN.parquet` hold the answers and are each written in one step, so what is in place is
whole; `manifest.json` is written last, when all rows have their answer.
"""

from dataclasses import dataclass, replace
from typing import Any

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import Config, ServeConfig
from rayloop.data.contract import RowContract
from rayloop.errors import ConfigError, DoesNotFit, RequestError
from rayloop.registry.release import ReleaseRecord, load_release
from rayloop.registry.store import open_registry
from rayloop.serve.offline.input import BatchInput, resolve_input
from rayloop.serve.offline.pieces import Piece
from rayloop.storage import Storage

FORMAT = 1
FOLDER = "predictions"
PLAN_FILE, ROWS_FOLDER = "plan.json", "rows"
TOLD = {
    "format": "the format",
    "model": "registry.model",
    "version": "the version",
    "artifact_digest": "the model file's digest",
    "engine": "the engine",
    "rows_per_file": "batch.rows_per_file",
    "input": "batch.input",
}
"""What must not differ between a result and those who go on with it, by its name to users."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultFile:
    """One file of the result: its place among them, its path, and the rows it answers."""

    index: int
    path: str
    rows: int
    piece: Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchWork:
    """A batch prediction that is about to run, or to go on.

    Attributes:
        storage: The root everything lives under.
        release: The version that predicts.
        source: What it reads.
        serve: How an engine is loaded: one thread.
        batch_rows: Rows in one call of the engine.
        num_workers: Engines wanted; 0 leaves the number open.
        folder: Where the result lies, relative to the root.
        rows_per_file: Rows in each file but the last.
        done: Files that were in place already, by index.
    """

    storage: Storage
    release: ReleaseRecord
    source: BatchInput
    serve: ServeConfig
    batch_rows: int
    num_workers: int
    folder: str
    rows_per_file: int
    done: frozenset[int] = frozenset()

    @property
    def num_files(self) -> int:
        """Files of the whole result."""
        return -(-self.source.rows // self.rows_per_file)

    @property
    def contract(self) -> RowContract:
        """The shape the model takes, and its labels."""
        return contract_of(self.release)

    def file(self, index: int) -> ResultFile:
        """One file of the result."""
        start = index * self.rows_per_file
        stop = min(start + self.rows_per_file, self.source.rows)
        path = f"{self.folder}/{file_name(index)}"
        piece = self.source.piece(start, stop)
        return ResultFile(index=index, path=path, rows=stop - start, piece=piece)

    def missing(self) -> list[ResultFile]:
        """The files still to be written, in row order."""
        return [self.file(index) for index in range(self.num_files) if index not in self.done]

    def plan(self) -> dict[str, Any]:
        """What the folder belongs to: where any of it differs, rows would not fit together."""
        return {
            "format": FORMAT,
            "model": self.release.model,
            "version": self.release.version,
            "artifact_digest": self.release.artifact_digest,
            "engine": engine_name(self.serve),
            "class_names": list(self.release.class_names),
            "input": {
                "kind": self.source.kind,
                "where": self.source.where,
                "digest": self.source.digest,
            },
            "rows": self.source.rows,
            "rows_per_file": self.rows_per_file,
        }


def contract_of(release: ReleaseRecord) -> RowContract:
    """The shape a release takes, and its labels."""
    height, width, channels = release.shape
    return RowContract(shape=(height, width, channels), class_names=tuple(release.class_names))


def engine_name(serve: ServeConfig) -> str:
    """The engine as far as it decides about answers."""
    return "onnx" if serve.engine == "onnx" else f"torch-{serve.precision}"


def file_name(index: int) -> str:
    """A file's path in the result's folder."""
    return f"{ROWS_FOLDER}/part-{index:05d}.parquet"


def open_work(storage: Storage, config: Config, clock: Clock = SYSTEM_CLOCK) -> BatchWork:
    """Resolve what the configuration asks for, and find out what of it is done already.

    Writes the plan where the result is new. Needs no Ray, so a wrong request is refused at once.

    Args:
        storage: The root everything lives under.
        config: The sections `batch`, `registry`, `data` and `serve`.
        clock: Asked for by the registry.

    Raises:
        DataMissing: There is no such version or input.
        ConfigError: The output's name is none.
        RequestError: The input does not suit the model, or the output belongs to something else.
        Corrupt: A file of the release does not match its digest.
    """
    batch, model = config.batch, config.registry.model
    _check_name(batch.output)
    registry = open_registry(storage, config.registry, clock)
    version = registry.resolve(model, batch.version)
    release = load_release(storage, model, version)
    source = resolve_input(storage, config.data, batch, contract_of(release))
    engine = "" if config.serve.engine == "onnx" else f"-{engine_name(config.serve)}"
    name = batch.output or plain_name(f"{model}-{version}{engine}-{source.name}")
    work = BatchWork(
        storage=storage,
        release=release,
        source=source,
        serve=engine_settings(config.serve, batch.batch_rows),
        batch_rows=batch.batch_rows,
        num_workers=batch.num_workers,
        folder=f"{FOLDER}/{name}",
        rows_per_file=batch.rows_per_file,
    )
    return claim(work)


def _check_name(name: str) -> None:
    if name != plain_name(name) or name.startswith("."):
        raise ConfigError(
            f"batch.output={name!r} must be letters, digits, '-', '_' and '.': the name of a "
            f"folder under RAYLOOP_HOME/{FOLDER}."
        )


def plain_name(text: str) -> str:
    """A text with everything but letters, digits, '-', '_' and '.' replaced by '-'."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text)


def engine_settings(serve: ServeConfig, batch_rows: int) -> ServeConfig:
    """The serve section for an engine of batch prediction: one thread and its own batch size.

    ONNX Runtime needs no warming for each batch size; torch fills batches up to a warm one.
    """
    rows = 1 if serve.engine == "onnx" else batch_rows
    queued = max(rows, serve.max_queued_rows)
    return replace(serve, cpus_per_replica=1, max_batch_rows=rows, max_queued_rows=queued)


def claim(work: BatchWork) -> BatchWork:
    """Take the result's folder, or take it up again where its plan is the same.

    Raises:
        RequestError: It belongs to something else.
    """
    storage, plan_path = work.storage, f"{work.folder}/{PLAN_FILE}"
    if storage.exists(plan_path):
        refuse_unless_same(storage.read_json(plan_path), work)
    elif storage.names(work.folder):
        raise RequestError(
            f"{storage.path(work.folder)} is not a batch prediction's folder: it has no "
            f"{PLAN_FILE}. Choose another name with --batch.output, or move it away."
        )
    else:
        storage.write_json(plan_path, work.plan())
    written = set(storage.names(f"{work.folder}/{ROWS_FOLDER}"))
    done = (i for i in range(work.num_files) if file_name(i).rpartition("/")[2] in written)
    return replace(work, done=frozenset(done))


def refuse_unless_same(plan: dict[str, Any], work: BatchWork) -> None:
    """Compare the plan of an existing result with what is asked for now.

    Raises:
        RequestError: They differ; the message says in what.
    """
    now = work.plan()
    differences = [
        f"{told} was {shown(plan.get(name))}, now {shown(now[name])}"
        for name, told in TOLD.items()
        if identity(plan.get(name)) != identity(now[name])
    ]
    if differences:
        raise RequestError(
            f"{work.storage.path(work.folder)} belongs to another batch prediction: "
            f"{'; '.join(differences)}. Choose another name with --batch.output, ask for the same "
            "as before, or remove that folder."
        )


def identity(value: Any) -> Any:
    """What must be equal: of an input its rows, wherever they lie."""
    return (value.get("kind"), value.get("digest")) if isinstance(value, dict) else value


def shown(value: Any) -> str:
    """A value of a plan for people, with digests cut short."""
    if isinstance(value, dict):
        return f"{value.get('where')} (digest {str(value.get('digest'))[:12]})"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def choose_workers(work: BatchWork, cpus: float, spare_cpus: int) -> int:
    """How many engines run beside one another, one CPU each.

    Args:
        work: Names the number wanted; never more run than there are files to write.
        cpus: Logical CPUs of the cluster.
        spare_cpus: Those that are left to the driver where no number is wanted.

    Raises:
        DoesNotFit: More are wanted than there are CPUs.
    """
    if work.num_workers > cpus:
        raise DoesNotFit(
            f"batch.num_workers={work.num_workers} needs {work.num_workers} CPUs; the cluster has "
            f"{cpus:g}. Lower batch.num_workers, or offer more with --cluster.num_cpus."
        )
    wanted = work.num_workers or int(cpus) - spare_cpus
    return max(1, min(wanted, work.num_files - len(work.done)))
