"""Commands in processes of their own, started as a terminal starts them, and waiting for what they do."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence


def start(
    command: Sequence[object], environment: dict[str, str], stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """In a process group of its own, so that a signal can reach all that it starts."""
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the condition holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended before: {process.communicate()}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
