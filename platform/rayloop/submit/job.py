"""What a cluster knows of one submitted job."""

from dataclasses import dataclass

RUNNING = ("PENDING", "RUNNING")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Job:
    """One submitted job.

    Attributes:
        name: As it was submitted.
        status: One of `RUNNING` or `ENDED`.
        message: What the cluster says of it.
        exit_code: Of its process; None where it never began or has not ended.
        command: What is run.
        began: Seconds since the epoch; None before it began.
        ended: Seconds since the epoch; None before its end.
    """

    name: str
    status: str
    message: str = ""
    exit_code: int | None = None
    command: str = ""
    began: float | None = None
    ended: float | None = None
