"""Hosts of their own on one machine: Linux namespaces with a cable each into one switch.

Every host has its own network, processes, name and `/tmp/ray`; what else lies on disk is shared, as
on machines with one network folder. A host loses its power when its first process is killed, and
its network when its cable is pulled.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, Done

NETWORK = "10.77.0"
BOOT = """
hostname "$1"
mount --bind "$2" /etc/hosts
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
while :; do sleep 1000 & wait; done
"""
BIN = Path(sys.executable).parent


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One of them.

    Attributes:
        name: Its own.
        address: Its IP address.
        power: The process that holds its namespaces.
        cable: Its end in the switch.
    """

    name: str
    address: str
    power: subprocess.Popen[bytes]
    cable: str
    switch: int
    env: dict[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Of its first process."""
        children = Path(f"/proc/{self.power.pid}/task/{self.power.pid}/children").read_text()
        return int(children.split()[0])

    def words(self, *words: object) -> list[str]:
        """A command line that runs another one here."""
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", f"--wd={ROOT}",
                *map(str, words)]  # fmt: skip

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command here."""
        return subprocess.Popen(self.words(*words), env=self.env, text=True, **options)

    def run(self, *words: object, timeout_s: float = 300, **env: str) -> Done:
        """Run a command here to its end."""
        done = subprocess.run(
            self.words(*words), env={**self.env, **env}, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def cut_power(self) -> None:
        """End every process here at once."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
            os.kill(self.pid, 9)
        self.power.kill()
        self.power.wait()

    def pull_cable(self) -> None:
        """Cut it off from the others."""
        _ip("-n", f"rl{self.switch}", "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        """Connect it again."""
        _ip("-n", f"rl{self.switch}", "link", "set", self.cable, "up")


class Hosts:
    """A switch, and the hosts on it."""

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self.names = folder / "hosts"  # every host's /etc/hosts
        self.names.write_text("127.0.0.1 localhost\n")
        self.number = int(uuid.uuid4().hex[:6], 16)
        self.env = dict(env)
        self.hosts: list[Host] = []
        _ip("netns", "add", f"rl{self.number}")
        _ip("-n", f"rl{self.number}", "link", "add", "br0", "type", "bridge")
        _ip("-n", f"rl{self.number}", "link", "set", "br0", "up")

    def add(self, name: str, last: int, **env: str) -> Host:
        """Put up a host.

        Args:
            name: Its own.
            last: The last number of its address.
            env: Further variables of every process here.
        """
        power = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",
             "unshare", "-m", "-u", "-n", "-p", "-f", "--kill-child", "--mount-proc",
             "sh", "-c", BOOT, "sh", name, str(self.names)]
        )  # fmt: skip
        with self.names.open("a") as names:
            names.write(f"{NETWORK}.{last} {name}\n")
        inner, outer = f"i{self.number % 0xFFFF:x}{last}", f"o{self.number % 0xFFFF:x}{last}"
        host = Host(name, f"{NETWORK}.{last}", power, outer, self.number, {**self.env, **env})
        self.hosts.append(host)
        wait_for(lambda: _is_up(host), 20, f"host {name} comes up")
        switch = f"rl{self.number}"
        _ip("link", "add", inner, "netns", str(host.pid), "type", "veth",
            "peer", "name", outer, "netns", switch)  # fmt: skip
        _ip("-n", switch, "link", "set", outer, "master", "br0", "up")
        for words in (["addr", "add", f"{host.address}/24", "dev", inner],
                      ["link", "set", inner, "up"],
                      # Programs find their own address by the way they would go out.
                      ["route", "add", "default", "dev", inner]):  # fmt: skip
            assert host.run("ip", *words).returncode == 0
        return host

    def close(self) -> None:
        """Take everything down."""
        for host in self.hosts:
            host.cut_power()
        subprocess.run(["ip", "netns", "del", f"rl{self.number}"], check=False)


def _is_up(host: Host) -> bool:
    try:
        return host.run("ip", "-br", "link", "show", "lo").stdout.find("UNKNOWN") > 0
    except (FileNotFoundError, IndexError):
        return False


@contextlib.contextmanager
def hosts(env: Mapping[str, str], folder: Path) -> Iterator[Hosts]:
    """A switch for as long as the block lasts; the test is skipped where this machine has none."""
    try:
        made = Hosts(env, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not give out network namespaces: {error}")
    try:
        yield made
    finally:
        made.close()


def wait_for(holds: Any, timeout_s: float, what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)
