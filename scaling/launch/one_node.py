"""A SLURM cluster of one node, for trying out on this machine what is meant for a real one.

    eval "$(python -m scaling.launch.one_node start /tmp/cluster)"   # prints: export SLURM_CONF=/tmp/cluster/slurm.conf
    sinfo
    python -m scaling.launch.one_node stop /tmp/cluster

Takes Debian's packages ``slurm-wlm`` and ``munge``, or the same from elsewhere. Its configuration, key, sockets, state
and logs are in the folder; its daemons run as the user who starts it, beside whatever else the machine has. Accounting
is off, as on clusters without a database: ``sacct`` knows nothing.
"""

import argparse
import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = (*DAEMONS, "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
INSTALL = "apt-get install slurm-wlm munge"
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_SECONDS = 60  # until the node is idle, and until everything has ended
_LONGEST = 100  # bytes of a socket's path that every system takes

CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=5
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The commands that this machine lacks."""
    return [name for name in COMMANDS if shutil.which(name, path=_PATH) is None]


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process that uses the cluster."""
    return {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}


@contextlib.contextmanager
def one_node(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """The cluster within this block, with the variables for its users. Jobs that are left are cancelled."""
    try:
        yield start(folder, cpus)
    finally:
        stop(folder)


def start(folder: Path, cpus: int = 2) -> dict[str, str]:
    """Start the cluster in a new or empty folder, or again in that of one that was stopped.

    Args:
        cpus: of the node, as jobs may ask for them; it may be more than the machine has.

    Raises:
        FileNotFoundError: commands are missing. FileExistsError: the folder has something else. ValueError: its path is
            too long for a socket. RuntimeError: the cluster did not start; its logs are told.
    """
    if lacking := missing():
        raise FileNotFoundError(f"SLURM is not installed: {', '.join(lacking)} not found. On Debian: {INSTALL}.")
    folder = folder.absolute()
    if len(os.fsencode(folder)) + len("/munge.socket") > _LONGEST:
        raise ValueError(f"the path {folder} is too long for a socket. Take one of at most {_LONGEST - 13} bytes.")
    if any(_process(folder, name) for name in DAEMONS):
        raise FileExistsError(f"a cluster runs in {folder}. Stop it first, or take another folder.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "slurm.conf").exists():
        raise FileExistsError(f"{folder} is not empty, and no cluster was started there. Take another folder.")
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    ports = _free_ports(2)
    host = socket.gethostname().partition(".")[0]
    text = CONF.format(folder=folder, host=host, ports=ports, user=getpass.getuser(), cpus=cpus)
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.chmod(0o600)
    key.write_bytes(secrets.token_bytes(128))
    own = environment(folder)
    for command in _daemons(folder):
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{command[0]} did not start: {done.stderr or done.stdout}{_logs(folder)}")
    if not _until(lambda: _told(own, "sinfo", "--noheader", "--format=%T").strip() == "idle"):
        raise RuntimeError(f"the node did not become idle within {_SECONDS} s.{_logs(folder)}")
    return own


def stop(folder: Path) -> None:
    """Cancel the jobs of the cluster, and end its daemons. Its files stay."""
    folder, own = folder.absolute(), environment(folder.absolute())
    if _process(folder, "slurmctld") is not None:
        _told(own, "scancel", f"--user={getpass.getuser()}")
        _until(lambda: not _told(own, "squeue", "--noheader"))
        _told(own, "scontrol", "shutdown")
        _until(lambda: not any(_process(folder, name) for name in ("slurmctld", "slurmd")))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for name in DAEMONS:
            if (pid := _process(folder, name)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if _until(lambda: not any(_process(folder, name) for name in DAEMONS), seconds=10):
            return


def _daemons(folder: Path) -> list[list[str]]:
    """The commands that start them; each returns when the daemon is in the background."""
    munge = {
        "--key-file": "munge.key", "--socket": "munge.socket", "--pid-file": "munged.pid", "--log-file": "munged.log",
        "--seed-file": "munge.seed",
    }  # fmt: skip
    options = [f"{option}={folder / name}" for option, name in munge.items()]
    conf = ["-f", str(folder / "slurm.conf")]
    commands = (["munged", "--force", *options], ["slurmctld", *conf], ["slurmd", *conf])
    return [[str(shutil.which(name, path=_PATH)), *rest] for name, *rest in commands]


def _process(folder: Path, name: str) -> int | None:
    """The number of a daemon of this folder, if it runs."""
    try:
        pid = int((folder / f"{name}.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(folder) in command else None


def _told(own: dict[str, str], *command: str) -> str:
    """What a command of SLURM prints; nothing where it fails."""
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=_SECONDS)
    return done.stdout if done.returncode == 0 else ""


def _until(holds, seconds: float = _SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.2)
    return held


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _logs(folder: Path) -> str:
    logs = {path.name: path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log"))}
    return "".join(f"\n{name}:\n{text}" for name, text in logs.items() if text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of the node; default: the machine's")
    args = parser.parse_args(argv)
    try:
        if args.what == "stop":
            stop(args.folder)
        else:
            print(f"export SLURM_CONF={start(args.folder, args.cpus)['SLURM_CONF']}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
