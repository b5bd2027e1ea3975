"""One rank fails: it says why, all others end in silence and at once. Two would wait for each other for ever.

The ranks stand in a ring, and a thread in each waits for a word of the next: DONE at the end of the work, or
FAILED, which it passes on before it ends its process. A rank that was killed says nothing: its connection
breaks, which the thread sees even while the main thread is inside a collective. A counter in the store that
all ranks share decides what failed first; the errors that follow from it are not printed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from partwise.engine.ranks import Ranks
from partwise.errors import StoppedError, UserError

DONE, FAILED = 1, 2
FOR_EVER = timedelta(days=3650)
# An error of torch may only follow from another rank's end: for so long, word of that may come.
AFTERSHOCK_SECONDS = 2.0
SEND_SECONDS = 0.5


class Guard:
    """The watch that a rank keeps over the next one in the ring.

    `names` says for each rank how a message calls it. With a `launcher`, its process id, a killed rank is
    reported there, where its signal is known.
    """

    def __init__(
        self, ranks: Ranks, ring: Any, store: dist.Store, names: list[str], launcher: int | None
    ) -> None:
        self.ranks, self.ring, self.names, self.launcher = ranks, ring, names, launcher
        self.store = store.clone()  # the main thread may hold the other connection while it waits
        self.next, self.previous = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
        self.lock = threading.Lock()  # a message is whole before the process ends
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._watch_next, daemon=True)

    def start(self) -> None:
        self.thread.start()
        if self.launcher is not None:
            threading.Thread(target=self._watch_launcher, daemon=True).start()

    def finish(self) -> None:
        """The work is done, here and on all others: no rank leaves while another may still fail."""
        self.ranks.barrier()
        self._tell(DONE)
        self.thread.join()
        self.finished.set()

    def fail(self, error: BaseException) -> NoReturn:
        """Report the error if it is the first of all, and end all processes."""
        if not isinstance(error, UserError):
            time.sleep(AFTERSHOCK_SECONDS)
        rank = self.ranks.rank
        if isinstance(error, UserError):
            text = f"error: rank {rank}: {error}" if rank else f"error: {error}"
        else:
            text = f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip()
        with self.lock:
            if self._is_first_failure():
                print(text, file=sys.stderr, flush=True)
        self.leave()

    def leave(self, code: int = 1) -> NoReturn:
        """End this process now, and the others with it."""
        sending = threading.Thread(target=self._tell, args=(FAILED,), daemon=True)
        sending.start()
        sending.join(SEND_SECONDS)
        with self.lock:
            # Not by an exception: the main thread may be inside a collective, and would never see it.
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the cursor, which the progress line hides
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def _watch_next(self) -> None:
        word = torch.zeros(1, dtype=torch.int64)
        try:
            dist.irecv(word, src=self.next, group=self.ring).wait(FOR_EVER)
        except RuntimeError:
            self._report_gone()
            self.leave()
        if word.item() == FAILED:
            self.leave()

    def _watch_launcher(self) -> None:
        """Without its launcher nobody sees this process or stops it: it saves and ends, as on SIGTERM."""
        while not self.finished.wait(1.0):
            if os.getppid() != self.launcher:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _report_gone(self) -> None:
        with self.lock:
            if self._is_first_failure(unknown=self.next == 0) and self.launcher is None:
                print(
                    f"error: {self.names[self.next]} is gone without a word. The usual cause is that its "
                    "machine was lost, or ran out of memory and killed it (dmesg says so). The run goes on "
                    "from its newest checkpoint with --resume.",
                    file=sys.stderr,
                    flush=True,
                )

    def _is_first_failure(self, unknown: bool = False) -> bool:
        """`unknown` where the store cannot be asked: rank 0, which may hold it, was the first to end."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:
            return unknown

    def _tell(self, word: int) -> None:
        with suppress(RuntimeError):  # it has ended before
            dist.send(torch.tensor([word]), dst=self.previous, group=self.ring)


@contextmanager
def guarded(guard: Guard) -> Iterator[None]:
    """A block that ends well on all ranks, or ends all processes."""
    guard.start()
    try:
        yield
    except StoppedError as stop:
        guard.finish()
        if guard.ranks.is_first:
            raise
        raise SystemExit(128 + stop.signal) from None
    except KeyboardInterrupt:
        guard.leave(128 + signal.SIGINT)
    except BaseException as error:
        guard.fail(error)
    else:
        guard.finish()
