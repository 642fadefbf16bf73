"""One local Ray for all tests of this folder that ask for it."""

from collections.abc import Iterator

import pytest

from rayloop.cluster import connect
from rayloop.config import ClusterConfig


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with four logical CPUs, started and stopped as a job does it."""
    with connect(ClusterConfig(num_cpus=2, object_store_bytes=300_000_000)):
        yield
