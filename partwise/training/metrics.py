"""What a run tells: metrics.jsonl for programs, a progress line for people.

In: a step's metrics or an evaluation loss. Out: one JSON line each, on disk at once. A resumed run first
drops the lines after its checkpoint, so each step stands in the file once. Plots are in plots/.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from partwise.errors import TrainingError
from partwise.evaluation.tables import CONTROL_TITLES, judged_line
from partwise.records import StepMetrics
from partwise.training.watch import Alarm

if TYPE_CHECKING:
    from partwise.evaluation.judgement import Judgement
    from partwise.trackers.tracking import Tracking
    from partwise.training.saver import Saved
    from partwise.training.stability import Decision

METRICS_FILE = "metrics.jsonl"
MOSTLY = 0.5  # from this share on, exactly-zero gradients are worth a place on the line


class MetricsLog:
    """RUN/metrics.jsonl, to append to; lines of steps after `last_step` are dropped first.

    Of several ranks, one `writes`. Where there are stages, each line names its own. `tracking` gets each
    record, too.

    Raises:
        TrainingError: the file cannot be written, here or for a later line.
    """

    def __init__(
        self,
        run_folder: Path,
        last_step: int = 0,
        writes: bool = True,
        stage: str = "",
        tracking: Tracking | None = None,
    ) -> None:
        self.path = run_folder / METRICS_FILE
        self.writes = writes
        self.named = {"stage": stage} if stage else {}
        self.tracking = tracking
        if not writes:
            return
        kept = [record for record in read_metrics(run_folder) if record["step"] <= last_step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        with self._told():
            partial.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
            partial.replace(self.path)

    def write_step(self, metrics: StepMetrics) -> None:
        record = asdict(metrics)
        if not metrics.preference:
            del record["preference"]
        self._write(record)

    def write_eval(
        self, step: int, eval_loss: float, preference: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        told = {"eval_preference": dict(preference)} if preference else {}
        self._write({"step": step, "eval_loss": eval_loss, **told})

    def write_scores(self, step: int, judgement: Judgement) -> None:
        groups = {
            name: judgement.mean(sample.scores for sample in samples)
            for name, samples in judgement.groups.items()
            if name
        }
        controls = judgement.control_scores
        self._write(
            {
                "step": step,
                "eval_scores": judgement.scores,
                "eval_judged_rows": len(judgement.samples),
                "eval_rows": judgement.num_rows,
                "eval_seconds": judgement.seconds,
                **({"eval_groups": groups} if groups else {}),
                **({"eval_control": controls} if controls else {}),
            }
        )

    def write_save(self, saved: Saved) -> None:
        self._write(
            {
                "step": saved.step,
                "checkpoint": saved.folder.name,
                "save_bytes": saved.num_bytes,
                "save_stall_seconds": saved.stall_seconds,
                "save_write_seconds": saved.write_seconds,
            }
        )

    def write_alarm(self, step: int, alarm: Alarm) -> None:
        self._write({"step": step, "warning": alarm.kind, "part": alarm.part, "message": alarm.message})

    def write_end(self, decision: Decision) -> None:
        self._write(decision.record)

    def _write(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self._told(), self.path.open("a") as file:
            file.write(json.dumps({**record, **self.named}) + "\n")
        if self.tracking is not None:
            self.tracking.log(record)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error}. Checkpoints are untouched: "
                "free space or make the folder writable, then resume."
            ) from error


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The run's records, oldest first; none when there is no file. A line that was cut off is left out."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class ProgressLine:
    """Where the run stands: a live line on a terminal, a plain line per logged step anywhere else."""

    def __init__(self, num_steps: int, first_step: int, console: Console) -> None:
        self.num_steps = num_steps
        self.first_step = first_step
        self.console = console
        self.start = time.monotonic()
        # Wraps in a narrow terminal: what stands at the end, such as the time left, stays in sight.
        line = TextColumn("{task.description}", table_column=Column())
        self._progress = Progress(BarColumn(bar_width=10), line, console=console)
        self._task = self._progress.add_task("starting", total=num_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def show_step(self, metrics: StepMetrics) -> None:
        done = metrics.step - self.first_step
        seconds_left = (time.monotonic() - self.start) / done * (self.num_steps - metrics.step)
        line = format_step(metrics, self.num_steps, seconds_left)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=metrics.step, description=line)
        else:
            self.console.print(line, soft_wrap=True, highlight=False)

    def show_eval(
        self, step: int, eval_loss: float, preference: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        told = f"  {format_preference(preference)}" if preference else ""
        self.show_text(f"step {step}/{self.num_steps}  eval loss {eval_loss:.4f}{told}")

    def show_scores(self, step: int, judgement: Judgement) -> None:
        means = "  ".join(f"{name} {value:.3f}" for name, value in judgement.scores.items())
        self.show_text(f"step {step}/{self.num_steps}  {means}  {judged_line(judgement)}")
        for images, scores in list(judgement.control_scores.items())[1:]:
            means = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self.show_text(f"step {step}/{self.num_steps}  {means}  with {CONTROL_TITLES[images]}s")

    def show_text(self, text: str) -> None:
        """A line that stays: on a terminal it scrolls up above the live one."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def format_step(metrics: StepMetrics, num_steps: int, seconds_left: float) -> str:
    """One line: step, loss, norm, learning rates, update-to-weight ratios, gradients that are mostly zero,
    input tokens per second, memory, drops, time left.
    """
    zeros = {part: share for part, share in metrics.zero_gradient_fractions.items() if share >= MOSTLY}
    fields = [
        f"step {metrics.step}/{num_steps}",
        f"loss {metrics.loss:.4f}",
        format_preference(metrics.preference),
        f"norm {metrics.grad_norm:.3g}",
        f"lr {by_part(metrics.learning_rates, '.2e')}",
        f"update {by_part(metrics.update_ratios, '.1e')}" if metrics.update_ratios else "",
        "zero gradients " + ",".join(f"{part} {share:.2f}" for part, share in zeros.items()) if zeros else "",
        f"{metrics.num_input_tokens / metrics.step_seconds:,.0f} tokens/s",
        f"{metrics.peak_memory_bytes / 2**30:.1f} GiB",
        f"dropped {sum(metrics.num_dropped.values())}" if metrics.num_dropped else "",
        f"left {timedelta(seconds=round(seconds_left))}",
    ]
    return "  ".join(field for field in fields if field)


def format_preference(told: Mapping[str, float]) -> str:
    """How far rewards of good and bad answers are apart, and how often the right one is higher."""
    if not told:
        return ""
    return f"margin {told['reward_margin']:.3f}  accuracy {told['reward_accuracy']:.2f}"


def by_part(values: dict[str, float], form: str) -> str:
    """ "projector 1e-04,language_model 2e-05", or one number when all parts have the same."""
    texts = {part: format(value, form) for part, value in values.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ",".join(f"{part} {text}" for part, text in texts.items())
