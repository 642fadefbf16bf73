"""Train on several nodes of this machine while one is taken away; run by test_nodes.py.

    python tests/e2e/nodes.py HOME RUN_ID {kill,drain} {resident,stream}

A head without CPUs and two nodes with room for one worker each. Once a checkpoint is there, one of
the two nodes is killed, or drained with notice as a spot machine is. `kill` adds a node later, so
that the run grows again. Prints one JSON line.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rayloop.cluster import set_environment

set_environment(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_health_check_period_ms": "1000",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.state import list_actors  # noqa: E402

from rayloop.config import Config, DataConfig, ModelConfig, TrainConfig  # noqa: E402
from rayloop.storage import Storage  # noqa: E402
from rayloop.tracking import Tracker  # noqa: E402
from rayloop.train import run as training  # noqa: E402
from rayloop.train.checkpoint import checkpoint_paths  # noqa: E402

CONFIG = Config(
    data=DataConfig(source="digits", val_share=0.15, steps_per_block=8),
    model=ModelConfig(widths=(8, 16)),
    train=TrainConfig(
        epochs=60,
        global_batch_size=64,
        norm_group_rows=32,
        min_workers=1,
        cpus_per_worker=1,
        floor_epochs=0.0,
        checkpoint_every_epochs=1.0,
    ),
)


def main() -> None:
    """Start the nodes, train, disturb, and say what came of it."""
    home, run_id, how, feed = sys.argv[1:]
    storage = Storage(home)
    config = replace(CONFIG, run_id=run_id, data=replace(CONFIG.data, feed=cast(Any, feed)))
    training.RESIZE_INTERVAL_S = 5.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with ThreadPoolExecutor() as pool:  # nodes can be added from the main thread only
            done = pool.submit(training.train, config, storage, Tracker(storage))
            told = disturb(cluster, nodes, storage, run_id, how, done)
            told["board_is_here"] = board_node() == ray.get_runtime_context().get_node_id()
            result = done.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({**told, **result.last_line()}))


def disturb(
    cluster: Cluster, nodes: list[Any], storage: Storage, run_id: str, how: str, done: Future[Any]
) -> dict[str, Any]:
    """Take a node away once there are checkpoints; gives the steps done at each event."""

    def wait_for_step(step: int) -> int:
        while newest(storage, run_id) < step and not done.done():
            time.sleep(0.1)
        return newest(storage, run_id)

    at = wait_for_step(30)
    if how == "drain":
        drain(cluster, nodes[1])
        return {"drained_at": at}
    cluster.remove_node(nodes[1], allow_graceful=False)
    again = wait_for_step(at + 100)
    cluster.add_node(num_cpus=1)
    return {"killed_at": at, "joined_at": again}


def drain(cluster: Cluster, node: Any) -> None:
    """Announce that a node goes away in a few seconds, as a cloud does, then take it."""
    words = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    words += ["--address", cluster.address, "--node-id", node.node_id]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*words, "--deadline-remaining-seconds", "8"], check=True, capture_output=True)
    time.sleep(8)
    cluster.remove_node(node, allow_graceful=False)


def board_node() -> str:
    """The node of the run's progress board, with which the run would end."""
    (board,) = list_actors(filters=[("class_name", "=", "ProgressBoard")])
    return str(board.node_id)


def newest(storage: Storage, run_id: str) -> int:
    """Steps done by the newest checkpoint."""
    paths = checkpoint_paths(storage, run_id)
    return int(paths[-1].rpartition("-")[2]) if paths else 0


if __name__ == "__main__":
    main()
