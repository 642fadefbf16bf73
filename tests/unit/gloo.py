"""Functions -> what gloo workers gave: one process imports torch, and its forks are the ranks.

Torch and what its data parallelism loads take seconds to import, and a process with threads, such
as pytest's, cannot be forked safely; so a fresh one imports all of it once.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GENEROUS_S = 240.0


@dataclass(frozen=True)
class Job:
    """A function every rank calls with its rank, the world's size and the arguments."""

    function: Callable[..., Any]
    world_size: int
    arguments: tuple[Any, ...] = ()


def start(jobs: list[Job], folder: Path) -> subprocess.Popen[str]:
    """Start a process that does the jobs one after the other; the functions must be importable."""
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    env = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
           "OPENBLAS_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}  # fmt: skip
    with (folder / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.unit.gloo", str(folder)], env=env, stderr=stderr,
            text=True, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def gloo_workers(jobs: list[Job], folder: Path) -> Iterator[Callable[[int], list[Any]]]:
    """Do the jobs in the background; gives a function from a job's index to its ranks' results."""
    process = start(jobs, folder)

    def results(index: int) -> list[Any]:
        process.wait(GENEROUS_S)
        errors = (folder / "stderr").read_text()
        parts = [folder / f"{index}-{rank}" for rank in range(jobs[index].world_size)]
        assert all(part.exists() for part in parts), errors
        return [pickle.loads(part.read_bytes()) for part in parts]

    try:
        yield results
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _work(job: Job, index: int, rank: int, folder: Path) -> None:
    import torch.distributed as dist

    store = f"file://{folder}/store-{index}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.world_size)
    result = job.function(rank, job.world_size, *job.arguments)
    dist.barrier()  # a rank that left early would end the exchange of the others
    dist.destroy_process_group()
    (folder / f"{index}-{rank}").write_bytes(pickle.dumps(result))


def _fork(job: Job, index: int, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _work(job, index, rank, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> None:
    """Do the jobs; a rank that fails ends those that wait for it."""
    import torch
    import torch._dynamo  # DDP loads it: once, for all ranks

    torch.set_num_threads(1)
    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    for index, job in enumerate(jobs):
        alive = {_fork(job, index, rank, folder) for rank in range(job.world_size)}
        while alive:
            done, status = os.wait()
            alive.discard(done)
            if status:
                for other in alive:
                    os.kill(other, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
