"""Which TCP ports of this machine are free: asked by binding them for a moment."""

import itertools
import random
import socket

QUIET_PORTS = range(32_000, 32_768)
"""Above those of Ray's workers and of Serve's replicas, below those Linux gives to outgoing
connections: one that is free now is still free when a server that starts slowly wants it."""


def port_is_free(host: str, port: int) -> bool:
    """Whether a TCP server could bind here now.

    Args:
        host: Address; empty means all IPv4 interfaces.
        port: 1 to 65535.
    """
    with _probe(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str, wanted: int = 0) -> int:
    """A port that is free now.

    Args:
        host: Address.
        wanted: The one to take if nobody has it; 0 for any.
    """
    start = random.SystemRandom().randrange(len(QUIET_PORTS))  # others look for one too
    quiet = itertools.islice(itertools.cycle(QUIET_PORTS), start, start + len(QUIET_PORTS))
    for port in itertools.chain([wanted] if wanted else [], quiet):
        if port_is_free(host, port):
            return port
    with _probe(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _probe(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)
