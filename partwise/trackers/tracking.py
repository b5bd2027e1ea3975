"""Trackers beside a training: a queue and a thread for each, so that none of them can stop it or slow it.

In: the records of metrics.jsonl and samples. Out: calls of the trackers. What a tracker raises is told once,
in the training's own thread, and its next call is tried all the same; one that does not start, or falls far
behind, is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from partwise.trackers.tracker import Sample, TrackedRun, Tracker

MOST_WAITING = 10_000  # calls that wait for a tracker; then it is left
FINISH_SECONDS = 60.0  # that the end of a run waits for all trackers together

MakeTracker = Callable[[TrackedRun], Tracker]
Call = Callable[[Tracker], None]


class Worker(Thread):
    """Makes one tracker and calls it, in its own thread. `fault` is the first that went wrong."""

    def __init__(self, name: str, make: MakeTracker, run: TrackedRun) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self.tracker_name = name
        self.make, self.tracked = make, run
        self.calls: SimpleQueue[Call | None] = SimpleQueue()
        self.fault: Exception | None = None
        self.is_told = False
        self.is_left = False

    def run(self) -> None:
        try:
            tracker = self.make(self.tracked)
        except Exception as error:
            self.fault, self.is_left = error, True
            return
        while (call := self.calls.get()) is not None:
            try:
                call(tracker)
            except Exception as error:
                self.fault = self.fault or error

    def put(self, call: Call | None) -> None:
        if not self.is_left and self.calls.qsize() >= MOST_WAITING:
            self.fault = self.fault or TimeoutError(f"{MOST_WAITING:,} records wait for it")
            self.is_left = True
        if not self.is_left:
            self.calls.put(call)


class Tracking:
    """The trackers of a run, as a block; `tell` prints a line. Calls return at once."""

    def __init__(
        self, makers: Mapping[str, MakeTracker], run: TrackedRun, tell: Callable[[str], None]
    ) -> None:
        self.tell = tell
        self.workers = [Worker(name, make, run) for name, make in makers.items()]

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put(lambda tracker: tracker.finish(failed=kind is not None))
        self._put(None)
        deadline = time.monotonic() + FINISH_SECONDS
        for worker in self.workers:
            worker.join(0 if worker.is_left else max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.fault = worker.fault or TimeoutError(f"not done after {FINISH_SECONDS:.0f} s")
        self._tell_faults()

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record of metrics.jsonl, at its step."""
        numbers = numbers_of(record)
        if numbers:
            self._put(lambda tracker: tracker.log(numbers, record["step"]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Rows with their images and texts, after so many steps."""
        self._put(lambda tracker: tracker.log_samples(samples, step))

    def _put(self, call: Call | None) -> None:
        for worker in self.workers:
            worker.put(call)
        self._tell_faults()

    def _tell_faults(self) -> None:
        for worker in self.workers:
            if worker.fault is not None and not worker.is_told:
                worker.is_told = True
                text = " ".join(str(worker.fault).split()) or type(worker.fault).__name__
                way = "is left out" if worker.is_left else "may lack records"
                self.tell(f"warning: the tracker {worker.tracker_name} {way}, training goes on: {text}")


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker draws of a record: "loss", "grad_norms/projector"; only what is finite."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{part}": number for part, number in numbers_of(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            numbers[name] = float(value)
    if numbers.get("step_seconds"):
        numbers["tokens_per_second"] = numbers.get("num_input_tokens", 0.0) / numbers["step_seconds"]
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
