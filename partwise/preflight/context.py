"""What the checks look at: the job, and what is dear to open, opened once for all of them.

In: a Job and how many rows may be read. Out: scans of its rows and its model on the device, each made when
the first check asks for it. Nothing is judged here.
"""

from __future__ import annotations

from functools import cached_property

from partwise.config import Config
from partwise.data.scan import Scan, scan_rows
from partwise.data.sources import Rows
from partwise.engine.device import free_memory
from partwise.model.load import LoadedModel
from partwise.training.job import Job


class Context:
    """`max_rows` None reads every row. `num_ranks` are those that share one copy of the model.

    `like` is the context of another stage that has the same rows.
    """

    def __init__(
        self,
        job: Job,
        max_rows: int | None = None,
        engine: str = "single",
        num_ranks: int = 1,
        like: Context | None = None,
    ) -> None:
        self.job = job
        self.max_rows = max_rows
        self.engine = engine
        self.num_ranks = num_ranks
        self.like = like

    @cached_property
    def stages(self) -> list[Context]:
        """The contexts of the run's stages; this one where there are none."""
        if self.job.stages[0] is self.job:
            return [self]
        contexts: list[Context] = []
        for job in self.job.stages:
            like = next((c for c in contexts if c.config.data == job.config.data), None)
            contexts.append(Context(job, self.max_rows, self.engine, self.num_ranks, like))
        return contexts

    @property
    def config(self) -> Config:
        return self.job.config

    @cached_property
    def train_scan(self) -> Scan:
        return self.like.train_scan if self.like else self._scan(self.job.rows)

    @cached_property
    def eval_scan(self) -> Scan | None:
        if self.like:
            return self.like.eval_scan
        return None if self.job.eval_rows is None else self._scan(self.job.eval_rows)

    def _scan(self, rows: Rows) -> Scan:
        num_workers = self.job.config.data.num_workers
        return scan_rows(rows, self.job.pixel_format, limit=self.max_rows, num_workers=num_workers)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model on its device with the plan applied."""
        return self.job.open_model()

    def let_go(self) -> None:
        """Of the model, which is opened again when it is asked for."""
        if self.__dict__.pop("loaded", None) is not None:
            free_memory()
