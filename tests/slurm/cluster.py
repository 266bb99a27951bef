"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# Names that are addresses: the host of rank 0, from the node list, needs no name service.
NODES = ("127.0.0.1", "127.0.0.2")

# cred_expire: a requeued job waits that long. KillWait: between SIGTERM and SIGKILL.
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=30
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def problem() -> str | None:
    """Return why this machine cannot run the cluster; None if it can."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"{missing[0]} is not in PATH: run tests/slurm/install.sh as root"
    return None if os.geteuid() == 0 else "the daemons of Slurm need root"


@contextlib.contextmanager
def running_cluster() -> Iterator[None]:
    """Run the cluster; SLURM_CONF selects it. All its processes and files are gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes at most
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(root=root, ports=free_ports(3), nodes=NODES))
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    munge_socket = root / "munge.socket"
    munged = ["munged", "--foreground", "--force", f"--socket={munge_socket}", f"--key-file={key}"]
    munged += [f"--{kind}-file={root}/munged.{kind}" for kind in ("pid", "log", "seed")]
    os.environ["SLURM_CONF"] = str(conf)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(start_daemon(root / "munged.out", *munged))
        wait_for(munge_socket.exists, "munged", logs=root)
        daemons.append(start_daemon(root / "slurmctld.log", "slurmctld", "-D"))
        for node in NODES:
            daemons.append(start_daemon(root / f"slurmd-{node}.log", "slurmd", "-D", "-N", node))
        ready = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_for(lambda: output_of(*ready) == "2", "two idle nodes", logs=root)
        yield
    finally:
        end_processes(daemons, f"SLURM_CONF={conf}")
        del os.environ["SLURM_CONF"]
        shutil.rmtree(root)


def start_daemon(log: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground of a session of its own."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def end_processes(daemons: list[subprocess.Popen[bytes]], variable: str) -> None:
    """Stop the daemons, and kill the tasks of jobs, which have the variable too."""
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(timeout=10)
    for pid in processes_with(variable):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for daemon in daemons:
        daemon.wait()


def processes_with(*variables: str) -> list[int]:
    """Return the processes that were started with these variables, NAME=VALUE."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if all(variable.encode() in environment for variable in variables):
                    found.append(int(folder.name))
    return found


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def output_of(*command: str) -> str:
    """Return what a command prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = 60, logs: Path | None = None
) -> None:
    """Wait until a condition holds; fail with the logs of the cluster."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            texts = [
                f"{log.name}:\n{log.read_text()[-2000:]}" for log in (logs or Path()).glob("*.log")
            ]
            raise TimeoutError("\n".join([f"no {what} after {seconds:g} s", *texts]))
        time.sleep(0.02)
