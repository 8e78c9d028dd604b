"""The states of SLURM jobs on a cluster without accounting, where ``sacct`` knows nothing: from the queue itself.

Imported only where submitit is installed.
"""

import subprocess

from submitit import SlurmJob
from submitit.slurm.slurm import SlurmInfoWatcher

GONE = "no longer in the queue"  # the state of a job that SLURM has forgotten, by default 5 minutes after its end
_DELAY = 60  # seconds between two looks at the queue, at most
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}


class QueueWatcher(SlurmInfoWatcher):
    """Asks ``squeue`` for all jobs of this user at once, at the times at which submitit asks ``sacct``."""

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        return ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Job -> its state, of those that were asked for; one that is not in the queue has ended."""
        text = string if isinstance(string, str) else string.decode()
        listed = dict(line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
        found = {job: listed.get(job, GONE) for job in self._registered - self._finished}
        return {job: {"JobID": job, "State": _plain(state)} for job, state in found.items()}


def _plain(state: str) -> str:
    """One of the states that submitit knows: those of the queue that it does not know would pass for ended."""
    if state in _ENDED or state == GONE:
        return state
    return "PENDING" if state in _WAITING else "RUNNING"


def has_accounting() -> bool:
    """Whether ``sacct`` answers."""
    try:
        asked = subprocess.run(["sacct", "--noheader", "--allocations", "--jobs=1"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def watch_by_queue() -> None:
    """Let the SLURM jobs of this process learn their states from the queue.

    Without accounting submitit would warn at each look, and never see the end of a job that was killed.
    """
    if not isinstance(SlurmJob.watcher, QueueWatcher):
        SlurmJob.watcher = QueueWatcher(delay_s=_DELAY)
