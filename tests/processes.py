"""Starting the processes of a run on several ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def end_with_this() -> None:
    """In a child: SIGKILL when this process is gone, even by `kill -9`. Ranks waited for each other without it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(script: str, ranks: int, *arguments: str, seconds: float = 120) -> None:
    """Run `python SCRIPT ARGUMENTS` once a rank over gloo, to the end."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(HERE / script), *arguments]
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": end_with_this}
    jobs = [subprocess.Popen(command, env=environment(**world, RANK=str(k)), **options) for k in range(ranks)]
    try:
        said = [job.communicate(timeout=seconds)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()  # or the next test is told of a process that is left
    assert [job.returncode for job in jobs] == [0] * ranks, "\n".join(text[-2000:] for text in said)
