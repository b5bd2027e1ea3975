"""Signals that ask a run to end: SIGTERM of a scheduler, SIGINT of Ctrl-C.

In a block with StopSignals the first one is only noted, so that the step in progress can finish and be
saved; a second one ends the process at once. What is done about it is the loop's business.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A block that notes in `received` the first stop signal; handlers are put back at its end.

    A signal that nobody acted on in the block is sent again after it. Outside the main thread, where Python
    allows no handlers, and for signals that the process was started to ignore, all stays as it is.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            self.previous = {}
        # None: not set by Python, so that Python could not put it back.
        self.previous = {n: old for n, old in self.previous.items() if old not in (signal.SIG_IGN, None)}
        for number in self.previous:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # os.write: a handler may run in the middle of a print, whose buffer cannot be entered again.
        if self.received:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the cursor, which the progress line hides
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        if os.isatty(2):
            os.write(2, f"\n{self.received.name}: stops after this step; once more ends it now\n".encode())
