"""A submitted job's log -> its lines as they come, and its last JSON line as the command's own."""

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable

from rayloop.errors import RayloopError, WorkError
from rayloop.submit.job import ENDED, Job

QUIET_S = 60.0
"""How long the head may be away, as while it is started anew, before following ends."""

SILENCE_S = 15.0
"""Without a line for so long, the head is asked whether it is still there."""

LOOK_S = 0.5
STOP_AGAIN_S = 1.0
"""Until a cluster that did not hear of a stop is told again."""

EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 143}


class Lines:
    """Text in pieces -> lines, of which the newest JSON object is held back.

    A job's two streams share one log, so something may follow its last line.

    Args:
        tell: Gets every line that is not held back.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._rest = ""
        self._seen = 0
        self._held: str | None = None

    @property
    def seen(self) -> int:
        """Characters taken in so far."""
        return self._seen

    def add(self, text: str) -> None:
        """Take in a piece."""
        self._seen += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> str | None:
        """Take what is left as the last line; gives the newest JSON object, or None."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        return self._held

    def _line(self, line: str) -> None:
        if not _is_object(line):
            self._tell(line)
            return
        if self._held is not None:
            self._tell(self._held)
        self._held = line


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def follow(
    stream: Callable[[], AsyncIterator[str]],
    look: Callable[[], Job | None],
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    quiet_s: float = QUIET_S,
    silence_s: float = SILENCE_S,
) -> tuple[int, str | None]:
    """Print what a job prints until it ends.

    A connection that breaks is opened again, and goes on where it was.

    Args:
        stream: Opens the log, from its beginning.
        look: The job; None where the cluster does not know it.
        tell: Gets each line.
        warn: Gets what is to be said about the connection.
        clock: Seconds.
        quiet_s: Longest time without contact.
        silence_s: After so long without a line the head is asked whether it is there.

    Returns:
        The exit code, and the last JSON line if there was one.

    Raises:
        WorkError: The head does not answer for `quiet_s`, or has forgotten the job.
    """
    lines = Lines(tell)
    lost_at: float | None = None
    told_at = -math.inf
    while True:
        seen = lines.seen
        try:
            asyncio.run(_read(stream, lines, look, silence_s))
            job = look()
        except Exception as error:  # whatever the network may raise
            lost_at = clock() if lost_at is None or lines.seen > seen else lost_at
            if clock() - lost_at > quiet_s:
                raise WorkError(
                    f"The cluster has not answered for {quiet_s:.0f} s ({error}). The job may go "
                    "on; the same command follows it again once the head is back."
                ) from None
            if lost_at > told_at:
                warn(f"no contact ({type(error).__name__}); trying for {quiet_s:.0f} s")
                told_at = lost_at
        else:
            if job is None:
                raise WorkError(
                    "The cluster does not know the job any more: its head was started anew "
                    "without its memory (a Redis keeps it). The same command starts the job again, "
                    "which goes on where its --run-id was."
                )
            if job.status in ENDED:
                last = lines.end()
                return _exit_code(job, warn), last
            lost_at = None
        time.sleep(LOOK_S)


class Stopper:
    """Tells a cluster to stop a job, again and again until it has heard it.

    Beside the following, since a head may be away for a moment just then.

    Args:
        stop: Asks for it; a RayloopError means that it was not heard.
        warn: Gets what is to be said about it.
    """

    def __init__(self, stop: Callable[[], object], warn: Callable[[str], None]) -> None:
        self._stop = stop
        self._warn = warn
        self._heard = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_owed(self) -> bool:
        """Whether a stop was wanted that the cluster does not know of."""
        return self._thread is not None and not self._heard.is_set()

    def start(self) -> None:
        """Begin to tell it, without waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._tell, daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the cluster has heard it, after at most so long."""
        return self._heard.wait(timeout_s)

    def _tell(self) -> None:
        is_first = True
        while not self._heard.is_set():
            try:
                self._stop()
                self._heard.set()
            except RayloopError as error:
                if is_first:
                    self._warn(f"it was not told to stop yet, and will be again: {error}")
                is_first = False
                self._heard.wait(STOP_AGAIN_S)


def _exit_code(job: Job, warn: Callable[[str], None]) -> int:
    """What a shell would see, had the job run here."""
    if job.status == "FAILED" and job.exit_code is None:
        warn(f"the job did not start: {job.message}")
    if job.status == "STOPPED" or job.exit_code is None:
        return EXIT_CODES[job.status]
    # A process that a signal ended has that signal's number, negative.
    return 128 - job.exit_code if job.exit_code < 0 else job.exit_code


async def _read(
    stream: Callable[[], AsyncIterator[str]],
    lines: Lines,
    look: Callable[[], Job | None],
    silence_s: float,
) -> None:
    """Read the log to its end as it is now, without what was read before.

    A head that lost its power closes no connection, so one that is silent is asked by another.
    """
    skip, pieces = lines.seen, aiter(stream())
    while True:
        coming = asyncio.ensure_future(_next(pieces))
        while not (await asyncio.wait({coming}, timeout=silence_s))[0]:
            try:
                await asyncio.to_thread(look)
            except BaseException:
                coming.cancel()
                raise
        text = coming.result()
        if text is None:
            return
        new = text[skip:]
        skip = max(0, skip - len(text))
        if new:
            lines.add(new)


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)
