"""The four trackers: the ONLY file that imports their libraries, each where it is made.

A resumed run goes on in the tracker's run of before. Where its numbers go is the library's own business: its
environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI, hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from partwise.errors import ConfigError
from partwise.trackers.tracker import Sample, TrackedRun, Tracker

MOST_PARAM_CHARACTERS = 500  # of a value that MLflow stores


class TensorBoard:
    """Event files in RUN/tensorboard. Events of steps that a resumed run does again are cut away."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.first_step + 1 if run.first_step else None
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge, flush_secs=10)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for i, sample in enumerate(samples):
            self.writer.add_text(f"samples/{i}", sample.text.replace("\n", "  \n"), step)
            for j, image in enumerate(sample.images):
                self.writer.add_image(f"samples/{i}-{j}", np.asarray(image), step, dataformats="HWC")

    def finish(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, whose x axis is the step: wandb's own counter cannot go back on resume."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # Else it would ask for a key on the terminal, which nobody watches.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError("no one is logged in. Run wandb login, or set WANDB_MODE=offline.")
        self.wandb = wandb
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        images = [
            self.wandb.Image(image, caption=sample.text) for sample in samples for image in sample.images
        ]
        rows = [[s.row, s.prompt, s.answer, s.generated or ""] for s in samples]
        table = self.wandb.Table(columns=["row", "prompt", "answer", "model"], data=rows)
        self.run.log({"samples": images, "sample_texts": table, "step": step})

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, known by a tag: MLflow gives runs their ids."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.Metric, self.client = Metric, MlflowClient()
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(run.project)
        known = self.client.search_runs([number], f"tags.`partwise.run_id` = '{run.run_id}'")
        if known:
            self.run_id = known[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        tags = {"partwise.run_id": run.run_id}
        self.run_id = self.client.create_run(number, tags=tags, run_name=run.name).info.run_id
        values = {key: str(value)[:MOST_PARAM_CHARACTERS] for key, value in flatten(run.config).items()}
        self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in values.items()])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.Metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for i, sample in enumerate(samples):
            place = f"samples/step-{step:06d}/{i}"
            self.client.log_text(self.run_id, sample.text, f"{place}.txt")
            for j, image in enumerate(sample.images):
                self.client.log_image(self.run_id, image, f"{place}-{j}.png")

    def finish(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Trackio:
    """A run of Trackio, in its own folder on this machine unless its variables name a server."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=run.project,
            name=run.unique_name,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for i, sample in enumerate(samples):
            for j, image in enumerate(sample.images):
                picture = self.trackio.Image(image, caption=sample.text)
                self.run.log({f"samples/{i}-{j}": picture}, step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish()


# Each is named as its package is.
TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def require_tracker(name: str, what: str) -> None:
    """Raises: ConfigError where the tracker's package is not installed; `what` asks for it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as wandb makes, is no package
        raise ConfigError(
            f"{what} needs the package {name}, which is not installed. pip install {name}, or "
            '"partwise[trackers]" for all trackers.'
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as "train.seed" and its value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
