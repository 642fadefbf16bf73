"""Run a version in a process of its own: images in by a pipe, probabilities out by another.

    python -m rayloop.serve.shadow.process MODULE:FUNCTION ARGUMENTS

FUNCTION takes the arguments, decoded from JSON, and gives an engine. A message is its length in
eight bytes, little-endian, and an array in NumPy's own file format; an empty one says that the
engine is ready.
"""

import ctypes
import importlib
import io
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.execution import Answers, Rows
from rayloop.serve.shadow.shadow import ShadowLost

START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 20.0
"""A shadow that takes longer over one batch hangs. It may be long: where all cores are busy, the
lowest priority waits."""

LENGTH_BYTES = 8
LARGEST_BYTES = 1 << 31
PR_SET_PDEATHSIG = 1
"""Linux, sys/prctl.h."""


class ShadowProcess:
    """The parent's end.

    Args:
        make: MODULE:FUNCTION that makes the engine.
        arguments: Its arguments, as JSON can hold them.
        answer_timeout_s: Longest time one batch may take.

    Raises:
        ShadowLost: The process ends or hangs before its engine is ready.
    """

    def __init__(
        self,
        make: str,
        arguments: list[Any],
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rayloop.serve.shadow.process", make, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        os.set_blocking(self._pipe(self._process.stdin), False)
        try:
            self._receive(start_timeout_s)
        except ShadowLost:
            self.stop()
            raise

    def predict(self, images: Rows) -> Answers:
        """Probabilities [N, K] of images [N, H, W, C].

        Raises:
            ShadowLost: The process ended, raised, or took too long.
        """
        self._write(message(images))
        content = self._receive(self._answer_timeout_s)
        with suppress(ValueError, EOFError):
            return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), np.float32)
        raise ShadowLost("its answer is no array")

    def stop(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _receive(self, timeout_s: float) -> bytes:
        length = int.from_bytes(self._read(LENGTH_BYTES, timeout_s), "little")
        if length > LARGEST_BYTES:
            raise ShadowLost("it wrote something else than an answer")
        return self._read(length, timeout_s)

    def _read(self, num_bytes: int, timeout_s: float) -> bytes:
        found = bytearray()
        while len(found) < num_bytes:
            with suppress(ValueError, OSError):  # closed by `stop`
                descriptor = self._pipe(self._process.stdout)
                if not select.select([descriptor], [], [], timeout_s)[0]:
                    raise ShadowLost(f"no answer within {timeout_s:g} s")
                if part := os.read(descriptor, num_bytes - len(found)):
                    found += part
                    continue
            raise ShadowLost(self._how_it_ended())
        return bytes(found)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            try:
                descriptor = self._pipe(self._process.stdin)
                if not select.select([], [descriptor], [], self._answer_timeout_s)[1]:
                    raise ShadowLost(f"it took no images for {self._answer_timeout_s:g} s")
                left = left[os.write(descriptor, left) :]
            except (ValueError, OSError):
                raise ShadowLost(self._how_it_ended()) from None

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> int:
        assert pipe is not None
        return pipe.fileno()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "its process stopped answering"
        return f"its process ended with {code}; its messages are in the replica's log"


def message(array: NDArray[Any]) -> bytes:
    """An array as it goes through a pipe."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return len(content.getvalue()).to_bytes(LENGTH_BYTES, "little") + content.getvalue()


def end_with_the_parent() -> None:
    """Let the kernel end this process with the thread that started it, also while it hangs."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lowest_priority() -> None:
    """Leave the CPU to everyone else: only what nobody wants is taken."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(make: str, arguments: str) -> None:
    """The child: answer until the pipe is closed."""
    end_with_the_parent()
    lowest_priority()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not stand between answers
    module, _, function = make.partition(":")
    engine = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    answers.write(bytes(LENGTH_BYTES))
    answers.flush()
    while len(head := sys.stdin.buffer.read(LENGTH_BYTES)) == LENGTH_BYTES:
        content = sys.stdin.buffer.read(int.from_bytes(head, "little"))
        images = np.load(io.BytesIO(content), allow_pickle=False)
        answers.write(message(engine.predict(images)))
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
