"""Rows -> one step's micro-batches, in an order that is a pure function of (seed, epoch, step).

In: rows, a ChatFormat and batch sizes. Out: StepData for any range of steps, so that resuming is starting
at another step. Worker processes prepare whole steps ahead. Each row comes once per epoch; the last step of
an epoch may have fewer rows. The rows of a step are the same for any number of ranks; each encodes a share of
its own (balance.py). How these share micro-batches is for collate.py: the step's sum is the same.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from partwise.data.balance import row_cost, share_rows
from partwise.data.chat import ChatFormat
from partwise.data.collate import micro_batches
from partwise.data.packing import PackFormat
from partwise.data.rows import row_name
from partwise.errors import DataError, UserError
from partwise.records import Batch, Conversation, Dropped, Example, StepData


class StepLoader:
    """One optimizer step's data after the other, for one of `num_ranks` ranks.

    Steps count from `start`, that of the first row, and run on over the epochs. `global_batch_size` is of
    all ranks, `micro_batch_size` of one; with `packs`, those say how much a micro-batch holds. `per_row`
    neighbours of `rows` are the answers of one row of the data, which is what batch sizes count: they come
    together or not at all. `others`, as many as `rows`, are looked at beside them. Each example brings along
    its number of `references` or `other_references`, where these were set.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        chat_format: ChatFormat,
        pad_token_id: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        num_workers: int,
        shuffle: bool = True,
        rank: int = 0,
        num_ranks: int = 1,
        packs: PackFormat | None = None,
        start: int = 0,
        per_row: int = 1,
        others: Sequence[Conversation] | None = None,
    ) -> None:
        self.rows = rows
        self.chat_format = chat_format
        self.pad_token_id = pad_token_id
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.rank = rank
        self.num_ranks = num_ranks
        self.packs = packs
        self.start = start
        self.per_row = per_row
        self.others = others
        self.references: Sequence[float] = ()
        self.other_references: Sequence[float] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return len(self.rows) // self.per_row

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    def iterate(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """The steps from `first_step` up to, but not including, `last_step`.

        Raises:
            DataError: a row cannot be used, or a step of the only rank has no target token; also where a
                worker found it.
        """
        yield from in_order(self.load_step, range(first_step, last_step), self.num_workers)

    def step_rows(self, step: int) -> list[int]:
        """Which rows the step holds, as indices into `rows`: those of all ranks."""
        return self._answers(self._data_rows(step))

    def _data_rows(self, step: int) -> list[int]:
        """Which rows of the data."""
        epoch, position = divmod(step - self.start, self.steps_per_epoch)
        first = position * self.global_batch_size
        rows = range(first, min(first + self.global_batch_size, self.num_rows))
        if not self.shuffle:
            return list(rows)
        return epoch_order(self.num_rows, self.seed, epoch)[rows.start : rows.stop].tolist()

    def _answers(self, rows: Sequence[int]) -> list[int]:
        return [row * self.per_row + answer for row in rows for answer in range(self.per_row)]

    def rank_rows(self, step: int) -> list[int]:
        """Which of the step's rows this rank has, in their order.

        Raises:
            DataError: a row is broken, this rank's or another's.
        """
        rows = self._data_rows(step)
        if self.num_ranks == 1:
            return self._answers(rows)
        limit = self.chat_format.max_seq_len
        costs = [sum(row_cost(self.rows[i], limit) for i in self._answers([row])) for row in rows]
        return self._answers([rows[position] for position in share_rows(costs, self.num_ranks)[self.rank]])

    def row_names(self, step: int) -> list[str]:
        """The step's rows, of all ranks, as errors name them."""
        conversations = [self.rows[row] for row in self.step_rows(step)]
        return list(dict.fromkeys(row_name(one.source, one.row) for one in conversations))

    def load_step(self, step: int) -> StepData:
        """This rank's micro-batches of the step, the longest first.

        One of several ranks may have none; whether all of them have is for those to say who know
        (`refuse_empty`).

        Raises:
            DataError: as `iterate`.
        """
        rows = self.rank_rows(step)
        examples, dropped = self._encode(self.rows, rows, self.references)
        if not examples and self.num_ranks == 1:
            refuse_empty(step, self.row_names(step), dropped)
        others: list[Example] = []
        if self.others is not None:
            others, _ = self._encode(self.others, rows, self.other_references)
        return StepData(step, self._batches(examples), dropped, others=self._batches(others))

    def _encode(
        self, rows: Sequence[Conversation], indices: Sequence[int], references: Sequence[float]
    ) -> tuple[list[Example], Counter[str]]:
        """The examples, and why rows of the data gave none: a row is dropped with all of its answers."""
        examples: list[Example] = []
        dropped: Counter[str] = Counter()
        for start in range(0, len(indices), self.per_row):
            answers = indices[start : start + self.per_row]
            results = [self.chat_format.examples(rows[index]) for index in answers]
            reasons = [result.reason for result in results if isinstance(result, Dropped)]
            if reasons:
                dropped[reasons[0]] += 1
                continue
            for index, result in zip(answers, results, strict=True):
                assert isinstance(result, list)
                if len(references):
                    result = [replace(example, reference=float(references[index])) for example in result]
                examples += result
        return examples, dropped

    def _batches(self, examples: Sequence[Example]) -> tuple[Batch, ...]:
        return micro_batches(examples, self.pad_token_id, self.micro_batch_size, self.packs, self.per_row)


def refuse_empty(step: int, names: Sequence[str], dropped: Counter[str]) -> NoReturn:
    """What stops a step in which no rank has a row: the names of its rows, and the reasons of all ranks.

    Raises:
        DataError: always.
    """
    reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
    raise DataError(
        f"step {step + 1} has no target token: all of its rows were dropped: {reasons}. The rows are "
        f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}. Raise data.max_seq_len, "
        "or remove these rows."
    )


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of all rows in an epoch: the same for the same arguments, on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def in_order(function: Callable[[int], Any], items: Sequence[int], num_workers: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed ahead by `num_workers` processes (0: in this one).

    Raises:
        UserError: as raised by the function, in whichever process.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    # One item ahead per worker: a step of images is large, and all workers are busy with that.
    loader = DataLoader(
        _Results(function, items),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=1,
        # A copy from other memory makes the host wait for all that the GPU was asked before.
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # else it draws from the global one, which a resumed run must find alike
    )
    for result in loader:
        if isinstance(result, UserError):
            raise result
        yield result


def ignore_stop_signals(_worker: int) -> None:
    """Ctrl-C and most schedulers signal all processes at once; when a worker ends is its parent's business.

    A worker without parent notices that by itself within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Results(Dataset):
    """function(item) as a data set; a UserError is a value, since DataLoader wraps what is raised."""

    def __init__(self, function: Callable[[int], Any], items: Sequence[int]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.items[index])
        except UserError as error:
            return error
