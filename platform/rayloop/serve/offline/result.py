"""Reports of the files written -> the manifest of a batch prediction, and what its job prints."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rayloop.clock import Clock, iso_utc
from rayloop.errors import WorkError
from rayloop.serve.offline.answers import Counts, read_counts
from rayloop.serve.offline.plan import BatchWork, file_name

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """What is told of a file that was just written.

    Attributes:
        index: Which file.
        counts: Of its rows.
        began_at: When its rows began to be read, in seconds since the epoch.
        ended_at: When it was in place, likewise.
    """

    index: int
    counts: Counts
    began_at: float
    ended_at: float


def images_per_second(reports: Iterable[FileReport]) -> float | None:
    """Rows a second from the first row read to the last file written; None without any.

    Loading the engines comes before and is not counted.
    """
    found = list(reports)
    if not found:
        return None
    began = min(report.began_at for report in found)
    ended = max(report.ended_at for report in found)
    return sum(report.counts.rows for report in found) / max(ended - began, 1e-9)


def finish(work: BatchWork, reports: Iterable[FileReport], clock: Clock) -> dict[str, Any]:
    """Write the manifest once every file is in place, and tell what the job prints.

    Args:
        work: As it was opened.
        reports: Of the files written since then.
        clock: Gives the time of completion.

    Raises:
        WorkError: A file is missing, or not one row could be read.
        Corrupt: A file of an earlier session is damaged.
    """
    written = {report.index: report for report in reports}
    counts = {index: report.counts for index, report in written.items()}
    for index in work.done:
        counts[index] = read_counts(work.storage, f"{work.folder}/{file_name(index)}")
    lost = work.num_files - len(counts)
    if lost:
        raise WorkError(
            f"{lost} of {work.num_files} files of {work.storage.path(work.folder)} were not "
            "written; run the same command again."
        )
    total = sum((counts[index] for index in sorted(counts)), Counts())
    _write_manifest(work, counts, total, clock)
    if total.errors == total.rows:
        raise WorkError(
            f"Not one of the {total.rows} images of {work.source.where} could be read; the first "
            f"is {total.first_error.rstrip('.')}. All reasons are in "
            f"{work.storage.path(work.folder)}, column 'error'."
        )
    rate = images_per_second(written.values())
    return {
        "model": work.release.model,
        "version": work.release.version,
        "digest": work.release.digest,
        "input": work.source.where,
        "output": work.storage.path(work.folder),
        "rows": total.rows,
        "errors": total.errors,
        "accuracy": total.accuracy,
        "images_per_second": None if rate is None else round(rate, 1),
        "files": work.num_files,
        "files_done_before": len(work.done),
    }


def _write_manifest(
    work: BatchWork, counts: dict[int, Counts], total: Counts, clock: Clock
) -> None:
    path = f"{work.folder}/{MANIFEST_FILE}"
    if work.storage.exists(path) and len(work.done) == work.num_files:
        return
    manifest = {
        **work.plan(),
        "release_digest": work.release.digest,
        "errors": total.errors,
        "accuracy": total.accuracy,
        "judged_rows": total.judged,
        "files": [
            {"path": file_name(i), "rows": counts[i].rows, "errors": counts[i].errors}
            for i in sorted(counts)
        ],
        "created_at": iso_utc(clock.now()),
    }
    work.storage.write_json(path, manifest)
