"""The trackers of a run: opened on the first rank, with the first rows as samples.

In: a Job, and how many steps were done before. Out: a Tracking for MetricsLog, or none. A run keeps its id in
RUN/tracking.json, so that a resumed one goes on in the trackers' runs of before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from rich.console import Console

from partwise.config import TrackConfig
from partwise.data.chat import read_pictures
from partwise.data.rows import row_name
from partwise.errors import DataError
from partwise.evaluation.questions import text_of
from partwise.records import Conversation
from partwise.trackers.libraries import TRACKERS
from partwise.trackers.tracker import Sample, TrackedRun
from partwise.trackers.tracking import Tracking
from partwise.training.job import Job

if TYPE_CHECKING:
    from partwise.data.sources import Rows
    from partwise.evaluation.judgement import Judgement

ID_FILE = "tracking.json"
SAMPLE_PIXELS = 512  # longest side of a sample's image


@contextmanager
def opened_tracking(job: Job, first_step: int, console: Console) -> Iterator[Tracking | None]:
    """The trackers of the run as a block; None where there are none, and on ranks that do not write."""
    track = job.config.tracking
    if track is None or not job.ranks.is_first:
        yield None
        return

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    folder = Path(job.config.output)
    run = TrackedRun(
        folder=folder,
        project=track.project,
        name=track.name or folder.resolve().name,
        run_id=read_run_id(folder),
        first_step=first_step,
        config=job.config.model_dump(mode="json", exclude_none=True),
    )
    with Tracking({name: TRACKERS[name] for name in track.to}, run, tell) as tracking:
        if first_step == 0:
            tracking.log_samples(first_samples(job, track), step=0)
        yield tracking


def read_run_id(folder: Path) -> str:
    """The id that trackers know the run by; a new one where the run has none yet."""
    path = folder / ID_FILE
    if path.is_file():
        return json.loads(path.read_text())["run_id"]
    run_id = uuid4().hex[:8]
    path.write_text(json.dumps({"run_id": run_id}) + "\n")
    return run_id


def first_samples(job: Job, track: TrackConfig) -> list[Sample]:
    """The first training rows that can be read, as many as the config asks for."""
    samples: list[Sample] = []
    for index in range(min(track.samples, len(job.rows))):
        try:
            samples.append(make_sample(job.rows[index]))
        except DataError:  # training says so when it comes to that row
            continue
    return samples


def answered_samples(rows: Rows, judgement: Judgement, number: int) -> list[Sample]:
    """The first judged rows with what the model answered. Raises: DataError."""
    shown = judgement.samples[:number]
    return [replace(make_sample(rows[sample.place]), generated=sample.answer) for sample in shown]


def make_sample(conversation: Conversation) -> Sample:
    """The row's images, what stands before its last answer, and that answer. Raises: DataError."""
    *before, last = conversation.messages
    pictures = [picture.pixels.copy() for picture in read_pictures(conversation)]
    for picture in pictures:
        picture.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    return Sample(
        row=row_name(conversation.source, conversation.row),
        images=tuple(pictures),
        prompt="\n".join(filter(None, map(text_of, before))),
        answer=text_of(last),
    )
