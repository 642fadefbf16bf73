"""What does not fit on the cluster is refused before Ray waits for it for ever."""

import os

import pytest

from rayloop import cluster
from rayloop.cluster import offered_cpus, refuse_unless_fits, refuse_unreachable
from rayloop.config import ClusterConfig
from rayloop.errors import DoesNotFit, RequestError


@pytest.mark.parametrize(
    ("nodes", "num_workers", "cpus_per_worker", "use_gpu"),
    [
        ([(4.0, 0.0)], 2, 1, False),
        ([(3.0, 0.0)], 2, 1, False),
        ([(4.0, 0.0), (5.0, 0.0)], 2, 4, False),
        ([(8.0, 2.0)], 2, 2, True),
        ([(8.0, 1.0), (8.0, 1.0)], 2, 4, True),
    ],
)
def test_what_fits_is_let_through(
    nodes: list[tuple[float, float]], num_workers: int, cpus_per_worker: int, use_gpu: bool
) -> None:
    refuse_unless_fits(nodes, num_workers, cpus_per_worker, use_gpu)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "cpus_per_worker", "use_gpu", "told"),
    [
        ([(2.0, 0.0)], 2, 1, False, "needs 2 CPUs and 1 more for the data stage"),
        ([(4.0, 0.0)], 8, 1, False, "has 4 CPUs and 0 GPUs on 1 node(s)"),
        ([(3.0, 0.0), (3.0, 0.0)], 1, 4, False, "train.cpus_per_worker=4 needs 4 CPUs"),
        ([(8.0, 0.0)], 1, 1, True, "needs 1 GPUs; the cluster has 8 CPUs and 0 GPUs"),
        ([(2.0, 4.0), (64.0, 0.0)], 4, 2, True, "on 2 node(s)"),
        ([], 1, 1, False, "has 0 CPUs and 0 GPUs on 0 node(s)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sums(
    nodes: list[tuple[float, float]],
    num_workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    told: str,
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        refuse_unless_fits(nodes, num_workers, cpus_per_worker, use_gpu)
    assert told in str(caught.value)
    assert "Lower train.num_workers" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "is a dashboard, to which jobs are submitted"),
        ("127.0.0.1:9", "There is no Ray at 127.0.0.1:9"),
        ("ray://127.0.0.1:9", "There is no Ray at ray://127.0.0.1:9"),
        ("no-such-host.invalid:6379", "There is no Ray at no-such-host.invalid:6379"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        refuse_unreachable(address)


def test_a_local_ray_offers_more_than_its_cores() -> None:
    assert offered_cpus(ClusterConfig(num_cpus=6)) == 8
    assert offered_cpus(ClusterConfig()) >= 3


def test_a_cluster_is_not_taken_for_the_local_ray_of_whoever_started_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in cluster.LOCAL_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "set_environment", lambda _: None)
    assert cluster.is_local()
    with (
        pytest.raises(RequestError, match=r"no Ray at 127\.0\.0\.1:9"),
        cluster.connect(ClusterConfig(address="127.0.0.1:9")),
    ):
        pass
    assert not cluster.is_local()
    assert not set(cluster.LOCAL_ENVIRONMENT) & set(os.environ)
