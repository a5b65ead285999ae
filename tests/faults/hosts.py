"""Hosts on this machine: each with addresses, processes, memory files and a /tmp of its own, joined by a bridge.

Linux namespaces, set up with iproute2 and util-linux; root is needed. What the hosts share is what a container
image would hold: the code, read-only by habit, and a folder of models, read-only by force, at IMAGE. Nothing
that one of them writes is seen by another.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from faults.nodes import named

IMAGE = "/mnt"
"""Where the shared folder lies in every host."""

START = """
    set -e
    mount --bind "$FOLDER" {image}
    mount -o remount,bind,ro {image}
    mount -t tmpfs tmpfs /tmp
    mount -t tmpfs tmpfs /dev/shm
    hostname {name}
    exec "$@"
"""
"""The first process of a host; when it dies, so does the rest of it."""


class Unavailable(Exception):
    """Namespaces cannot be made here, and why."""


def run(*command: str) -> None:
    """A command of ours; its complaint as Unavailable."""
    path = shutil.which(command[0])
    if path is None:
        raise Unavailable(f"{command[0]} is not installed")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")


class Hosts:
    """A bridge and the hosts on it; `gateway` is this machine's own address there."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: what all hosts see, at IMAGE."""
        self._folder = folder
        self._mark = secrets.token_hex(3)
        self._net = f"10.213.{secrets.randbelow(256)}"
        self._bridge = f"ub{self._mark}"
        self.gateway = f"{self._net}.254"
        self.hosts: list[Host] = []
        # An address of its own: it would take the least of its hosts', and another when that host goes, which the
        # others would look for in vain until they ask anew.
        run("ip", "link", "add", self._bridge, "address", "02:00:00:00:00:fe", "type", "bridge")
        run("ip", "address", "add", f"{self.gateway}/24", "dev", self._bridge)
        run("ip", "link", "set", self._bridge, "up")

    def start(self, environment: dict[str, str], *command: str) -> Host:
        """A new host whose first process is the command; `{address}` in it is the host's address."""
        number = len(self.hosts) + 1
        name, cable = f"ub{self._mark}h{number}", f"ub{self._mark}v{number}"
        address = f"{self._net}.{number}"
        run("ip", "netns", "add", name)
        try:
            run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", cable, "master", self._bridge, "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            host = Host(
                name,
                address,
                self._folder,
                environment,
                [part.replace("{address}", address) for part in command],
            )
        except BaseException:
            with contextlib.suppress(Unavailable):
                run("ip", "netns", "delete", name)
            raise
        self.hosts.append(host)
        return host

    def close(self) -> None:
        """Power everything off."""
        for host in self.hosts:
            host.power_off()
        with contextlib.suppress(Unavailable):
            run("ip", "link", "delete", self._bridge)


class Host:
    """One host, from power on to power off."""

    def __init__(
        self, name: str, address: str, folder: Path, environment: dict[str, str], command: list[str]
    ) -> None:
        self.name, self.address, self._environment = name, address, environment
        self.said = folder.parent / f"{name}.said"
        spaces = ("--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child")
        script = START.format(image=IMAGE, name=name)
        with self.said.open("w") as said:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", *spaces, "sh", "-c", script, "sh", *command],
                env={**environment, "FOLDER": str(folder)}, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process.poll() is None

    @property
    def joined(self) -> bool:
        """Whether Ray has started on it."""
        return "Ray runtime started" in self.said.read_text()

    @property
    def processes(self) -> list[psutil.Process]:
        """All of its processes, as this machine sees them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def runs(self, kind: str) -> bool:
        """Whether one of its processes is a Ray worker of a kind."""
        return any(named(process, kind) for process in self.processes)

    def command(self, *command: str) -> list[str]:
        """A command line that runs a command in the host."""
        first = next(p for p in self.processes if p.ppid() == self._process.pid)
        spaces = ("--net", "--mount", "--pid", "--uts", "--ipc")
        return ["nsenter", f"--target={first.pid}", *spaces, f"--wd={os.getcwd()}", *command]

    def popen(self, said: Path, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the host; what it says goes to a file of this machine."""
        with said.open("ab") as file:
            return subprocess.Popen(self.command(*command), env=self._environment, stdout=file, stderr=file)

    def power_off(self) -> None:
        """All of its processes die at once, and its cable is pulled."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        with contextlib.suppress(Unavailable):
            run("ip", "netns", "delete", self.name)


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """Hosts for the length of a block.

    Raises:
        Unavailable: no namespaces here.
    """
    if sys.platform != "linux":
        raise Unavailable("namespaces are Linux's")
    made = Hosts(folder)
    try:
        yield made
    finally:
        made.close()


def wait_for(port: int, host: Host, seconds: float = 60) -> None:
    """Until something listens on a port of a host."""
    import socket

    deadline = time.monotonic() + seconds
    while True:
        assert host.alive, host.said.read_text()
        assert time.monotonic() < deadline, host.said.read_text()
        with contextlib.suppress(OSError), socket.create_connection((host.address, port), timeout=1):
            return
        time.sleep(0.1)
