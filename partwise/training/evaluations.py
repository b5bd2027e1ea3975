"""Evaluations of a run while it trains: when, of what, and what follows from them.

In: the model as it is after a step. Out: the loss on the held-out rows and the scores of the model's answers,
in metrics.jsonl, on the console and for the manifest of a checkpoint; samples.jsonl and samples.html of the
newest; and whether training should end, because nothing got better. The training is, to the bit, what it
would be without them. Which checkpoint is best, checkpoint.py knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partwise.config import Config
from partwise.data.sources import Rows
from partwise.evaluation.generate import make_answerer
from partwise.evaluation.judgement import Asking, Judgement, join_shares, judge_rows
from partwise.evaluation.judges import load_judges
from partwise.evaluation.report import write_report
from partwise.evaluation.tables import judgement_tables
from partwise.model.compile import uncompiled
from partwise.training.checkpoint import LOSS, cost_in
from partwise.training.metrics import MetricsLog, ProgressLine, read_metrics
from partwise.training.preference import Evaluated, Preference
from partwise.training.probe import measuring
from partwise.training.share import Shares
from partwise.training.span import StageSpan
from partwise.training.step import evaluate_loss
from partwise.training.tracked import answered_samples

if TYPE_CHECKING:
    import torch

    from partwise.model.load import LoadedModel


@dataclass(frozen=True)
class Measured:
    """What an evaluation found; None of what was not measured, or given up for a stop signal."""

    loss: float | None = None
    scores: dict[str, float] | None = None


class Schedule:
    """After which steps of a run or stage what is measured; `last_step` is its last one."""

    def __init__(self, config: Config, last_step: int) -> None:
        self.train = config.train
        self.every = config.evaluate.every if config.evaluate else None
        self.last_step = last_step

    def measures_at(self, done: int) -> bool:
        """Whether the loss is."""
        return self.judges_at(done) or is_due(done, self.train.eval_every)

    def judges_at(self, done: int) -> bool:
        """Whether answers are, too: also of a checkpoint that may turn out to be the best."""
        is_candidate = self.train.keep_best > 0 and is_due(done, self.train.save_every)
        return done == self.last_step or is_due(done, self.every) or is_candidate


class Evaluations:
    """Those of one run or stage. `steps` are the held-out rows; without them there are no evaluations.

    Raises:
        ConfigError: a metric is unknown, or cannot be loaded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        steps: Shares | None,
        span: StageSpan,
        run_folder: Path,
        log: MetricsLog,
        progress: ProgressLine,
        preference: Preference | None = None,
    ) -> None:
        self.loaded = loaded
        self.preference = preference
        self.settings = config.evaluate
        self.span = span
        self.schedule = Schedule(config, span.last_step)
        self.steps = steps
        self.run_folder = run_folder
        self.log = log
        self.progress = progress
        self.asking = make_asking(config)
        self.num_tracked = config.tracking.samples if config.tracking else 0
        self.best_by = config.best_by
        # All ranks must decide alike, and one of them has the file.
        self.costs = self.read_costs() if steps is not None else []

    def read_costs(self) -> list[tuple[int, float]]:
        """(step, cost) of the evaluations so far, from metrics.jsonl: a resumed run goes on counting."""
        assert self.steps is not None
        records = read_metrics(self.run_folder) if self.log.writes else ()
        mine = (record for record in records if record["step"] > self.span.first_step)
        known = [(r["step"], cost) for r in mine if (cost := cost_in(r, self.best_by)) is not None]
        return self.steps.engine.ranks.from_first(known)

    def are_due(self, done: int) -> bool:
        """Whether anything is measured after this step."""
        return self.steps is not None and self.schedule.measures_at(done)

    def run(self, done: int, is_last: bool, device: torch.device, is_stopped: Callable[[], bool]) -> Measured:
        """Measure what is due, all of it after a last step, and tell it. All ranks must call it.

        A long evaluation is given up for a stop signal: the checkpoint matters more.

        Raises:
            DataError: a row is broken, or a metric refuses an answer.
        """
        if self.steps is None or not (is_last or self.schedule.measures_at(done)):
            return Measured()
        evaluated = self.evaluate(self.steps, device, is_stopped)
        if evaluated is not None:
            self.log.write_eval(done, *evaluated)
            self.progress.show_eval(done, *evaluated)
        loss = evaluated.loss if evaluated else None
        judgement = None
        if self.asking and (is_last or self.schedule.judges_at(done)):
            judgement = self.judge(self.asking, is_stopped)
        if judgement is not None:
            self.tell(done, judgement)
        measured = Measured(loss, judgement.scores if judgement else None)
        cost = cost_in({"eval_loss": loss, "eval_scores": measured.scores or {}}, self.best_by)
        if cost is not None:
            self.costs.append((done, cost))
        return measured

    def evaluate(
        self, steps: Shares, device: torch.device, is_stopped: Callable[[], bool]
    ) -> Evaluated | None:
        """The objective's loss; None where a stop signal came."""
        model, engine = self.loaded.model, steps.engine
        if self.preference is not None:
            return self.preference.evaluate(model, steps, device, is_stopped, engine)
        loss = evaluate_loss(model, steps, device, is_stopped, engine)
        return None if loss is None else Evaluated(loss, {})

    def judge(self, asking: Asking, is_stopped: Callable[[], bool]) -> Judgement | None:
        """What all ranks judged; None where a stop signal came to one of them."""
        assert self.steps is not None
        ranks, loader, model = self.steps.engine.ranks, self.steps.loader, self.loaded.model
        processor, features = loader.chat_format.processor, loader.chat_format.features
        answer = make_answerer(model, processor, self.max_new_tokens, features)
        with measuring(model), uncompiled():
            mine = judge_rows(answer, self.rows, asking, ranks.rank, ranks.size, is_stopped)
        if ranks.any(is_stopped()):
            return None
        return join_shares(asking, ranks.gather(mine))

    @property
    def rows(self) -> Rows:
        assert self.steps is not None
        rows = self.steps.loader.rows
        assert isinstance(rows, Rows), "answers are rows of files"
        return rows

    @property
    def max_new_tokens(self) -> int:
        assert self.settings is not None
        return self.settings.max_new_tokens

    def tell(self, done: int, judgement: Judgement) -> None:
        self.log.write_scores(done, judgement)
        self.progress.show_scores(done, judgement)
        if self.log.writes:
            tables = judgement_tables(judgement, self.asking.group_by if self.asking else None)
            title = f"{self.run_folder}: answers after step {done}"
            write_report(self.run_folder, title, judgement, self.rows, tables, step=done)
        if self.log.tracking is not None:
            shown = answered_samples(self.rows, judgement, self.num_tracked)
            self.log.tracking.log_samples(shown, done)

    @property
    def is_stalled(self) -> bool:
        """Whether the last `patience` evaluations were not better than the best before them."""
        patience = self.settings.patience if self.settings else None
        if patience is None or len(self.costs) <= patience:
            return False
        costs = [cost for _, cost in self.costs]
        return min(costs[-patience:]) >= min(costs[:-patience])

    @property
    def stalled_text(self) -> str:
        step, cost = min(self.costs, key=lambda known: known[1])
        best = cost if self.best_by == LOSS else -cost
        assert self.settings is not None
        return (
            f"the best {self.best_by} was {best:.4f}, after step {step}, and evaluate.patience is "
            f"{self.settings.patience}"
        )


def make_asking(config: Config) -> Asking | None:
    """What the config says to ask; None where it is nothing. Raises: ConfigError as for the metrics."""
    settings = config.evaluate
    if settings is None or not settings.metrics:
        return None
    return Asking(
        judges=load_judges(settings.metrics, config.where("evaluate.metrics")),
        max_rows=settings.rows,
        batch_size=settings.batch_size,
        group_by=settings.group_by,
        control=settings.control,
        budget_seconds=settings.budget_seconds,
        seed=config.train.seed,
    )


def is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
