"""Write the program that Serve starts as HAProxy on a cluster's node.

    python deploy/front.py /var/lib/rayloop

RAY_SERVE_HAPROXY_BINARY_PATH in deploy/ray.env names it; its limits are the cluster preset's.
"""

import sys
from pathlib import Path

from rayloop.haproxy import write_front
from rayloop.presets import cluster


def main() -> None:
    """Write it into the folder that the first argument names."""
    print(write_front(Path(sys.argv[1]), cluster().serve))


if __name__ == "__main__":
    main()
