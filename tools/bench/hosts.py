"""Simulates several hosts on one Linux machine: network namespaces joined by a bridge.

    with Hosts(2, mbit=1000) as hosts:       two hosts; each sends at most 1 Gbit/s to others
        hosts.popen(0, ["torchrun", "--nnodes", "2", ...])       starts a process on host 0
        os.fork() or hosts.enter(1)                              moves a forked process to host 1

A process on a host uses the files and cores of the machine, but only the network of its host. That
network has two interfaces: `lo`, which is as fast as the machine copies memory, and `eth0`, which
is connected to the bridge and may be limited. Needs root and iproute2 (the commands ip and tc).
Used by tools/verify/two_hosts.py, tools/bench/hierarchy.py and tests; it is not a command.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
INTERFACE = "eth0"
CLONE_NEWNET = 0x40000000
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # bits, see capabilities(7)


def run(line: str) -> str:
    """Runs a command of iproute2, for example "ip netns add name". Returns its output.

    Raises OSError with the first line of its error message.
    """
    name, *rest = line.split()
    done = subprocess.run([shutil.which(name, path=PATH), *rest], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{line}: {(done.stderr or done.stdout).strip()}".partition("\n")[0])
    return done.stdout


def capable(name: str) -> bool:
    """True if this process has the capability. False on a system other than Linux."""
    try:
        with open("/proc/self/status") as file:
            effective = re.search(r"CapEff:\s*(\w+)", file.read())[1]
    except FileNotFoundError:
        return False
    return bool(int(effective, 16) >> CAPABILITIES[name] & 1)


def missing() -> str | None:
    """None if hosts can be simulated here; otherwise one line with the reason and the remedy."""
    for name in CAPABILITIES:
        if not capable(name):
            return (f"network namespaces need {name}: use sudo, or a container that was started "
                    f"with --cap-add {name}")  # fmt: skip
    for name in ("ip", "tc"):
        if not shutil.which(name, path=PATH):
            return f"there is no {name}: install iproute2"
    try:
        with Hosts(2, mbit=1000):
            return None
    except OSError as error:
        return f"this kernel or container does not allow it: {error}"


def sent_bytes() -> int:
    """Bytes that the host of this process has sent to other hosts, headers included."""
    with open("/proc/self/net/dev") as file:
        return _sent(file.read())


def _sent(counters: str) -> int:
    row = next(line for line in counters.splitlines() if line.strip().startswith(INTERFACE))
    return int(row.split(":")[1].split()[8])


class Hosts:
    """n hosts; host i has addresses[i]. mbit: Mbit/s that each host can send (None: no limit)."""

    def __init__(self, n: int, mbit: float | None = None):
        self.mbit = mbit
        self.names = [f"host{i}-{os.getpid()}" for i in range(n)]
        self.switch = f"switch-{os.getpid()}"
        self.addresses = [f"10.77.0.{1 + i}" for i in range(n)]

    def __enter__(self) -> "Hosts":
        try:
            run(f"ip netns add {self.switch}")
            run(f"ip -n {self.switch} link add bridge type bridge")
            run(f"ip -n {self.switch} link set bridge up")
            for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                run(f"ip netns add {name}")
                run(f"ip -n {name} link add {INTERFACE} type veth peer name port{i} netns "
                    f"{self.switch}")  # fmt: skip
                run(f"ip -n {self.switch} link set port{i} master bridge up")
                run(f"ip -n {name} address add {address}/24 dev {INTERFACE}")
                run(f"ip -n {name} link set lo up")
                run(f"ip -n {name} link set {INTERFACE} up")
                if self.mbit:
                    run(f"tc -n {name} qdisc add dev {INTERFACE} root tbf rate {self.mbit}mbit "
                        "burst 256kb latency 100ms")  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in (*self.names, self.switch):
            with contextlib.suppress(OSError):  # it may not exist, if __enter__ failed
                run(f"ip netns delete {name}")

    def enter(self, i: int) -> None:
        """Moves this process to host i. It must still have one thread. gloo will use eth0."""
        with open(f"/var/run/netns/{self.names[i]}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def popen(self, i: int, command: list[str], **kwargs) -> subprocess.Popen:
        """Starts a process on host i."""
        ip = shutil.which("ip", path=PATH)
        return subprocess.Popen([ip, "netns", "exec", self.names[i], *command], **kwargs)

    def sent_bytes(self, i: int) -> int:
        """Bytes that host i has sent to other hosts, headers included."""
        done = self.popen(i, ["cat", "/proc/net/dev"], stdout=subprocess.PIPE, text=True)
        return _sent(done.communicate()[0])
