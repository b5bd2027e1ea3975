"""A stage of training: step, log, maybe evaluate, maybe save. Nothing else.

In: a model with its plan applied, and loaders. Out: a trained model, metrics.jsonl and checkpoints.
Opening the pieces and writing final/ is the caller's business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from partwise.config import Config
from partwise.engine.device import peak_memory_bytes, seed_everything
from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine
from partwise.errors import StoppedError
from partwise.lineage.manifest import stamp_manifest
from partwise.lineage.verify import Probe
from partwise.model.parts import set_train_mode, verify_plan
from partwise.model.quantize import quantization_of
from partwise.records import Finding, PartsPlan, StepData, StepMetrics
from partwise.training.checkpoint import checkpoint_folder, load_checkpoint, resume_command, step_of
from partwise.training.evaluations import Evaluations, is_due
from partwise.training.fault import explain_fault
from partwise.training.metrics import MetricsLog, ProgressLine, read_metrics
from partwise.training.optim import Optimizer
from partwise.training.preference import Preference
from partwise.training.probe import take_probe
from partwise.training.proof import Proof, add_to_report
from partwise.training.saver import Saver
from partwise.training.share import Shares
from partwise.training.span import StageSpan
from partwise.training.stability import PATIENCE, Decision, Ending
from partwise.training.step import (
    NonFiniteError,
    StepOutcome,
    StepValues,
    read_outcomes,
    train_step,
)
from partwise.training.stop import StopSignals
from partwise.training.verifier import Verifier
from partwise.training.watch import Watch

if TYPE_CHECKING:
    from partwise.data.loader import StepLoader
    from partwise.model.load import LoadedModel
    from partwise.trackers.tracking import Tracking


def run_stage(
    loaded: LoadedModel,
    plan: PartsPlan,
    config: Config,
    loader: StepLoader,
    eval_loader: StepLoader | None,
    run_folder: Path,
    num_steps: int,
    manifest: dict[str, Any],
    resume_from: Path | None = None,
    console: Console | None = None,
    engine: Engine | None = None,
    span: StageSpan | None = None,
    whole_plan: PartsPlan | None = None,
    tracking: Tracking | None = None,
    open_preference: Callable[[], Preference | None] = lambda: None,
) -> dict[str, Any]:
    """Train to `num_steps`, from the start or from a checkpoint; the run's manifest, stamped at the end.

    With several ranks each of them runs it, and the first one writes and prints. A stage that others follow
    ends with a checkpoint. `span` says which steps of the run the stage has, and `whole_plan` is the plan of
    all stages, which is what is saved. `open_preference` gives the loss in place of the token loss; it is
    called when the model can be run and no checkpoint was loaded.

    Raises:
        PlanError: what trains is not what the plan says.
        CheckpointError: `resume_from` does not fit this run.
        DataError: a row is broken, or a step has no target token.
        TrainingError: a loss or gradient is not finite, a tensor that trains stands or a frozen one changed,
            or a checkpoint cannot be written.
        StoppedError: SIGTERM or SIGINT came; the step in progress was finished and a checkpoint saved.
    """
    engine, span, whole_plan = engine or Engine(), span or StageSpan(num_steps), whole_plan or plan
    model, train, ranks = loaded.model, config.train, engine.ranks
    device = engine.device or model.device
    verify_plan(model, plan, "the weights were spread over ranks")
    optimizer = Optimizer(model, plan, train, num_steps, engine, span.first_step)
    preference = open_preference()
    first_step = 0
    if resume_from:
        is_new_stage = 0 < span.first_step == step_of(resume_from)
        first_step = load_checkpoint(resume_from, optimizer, manifest, is_new_stage)
    set_train_mode(model, plan)

    proof = Proof(model, plan, optimizer)
    log = MetricsLog(run_folder, first_step, ranks.is_first, span.name, tracking)
    steps = Shares(loader, engine)
    eval_steps = Shares(eval_loader, engine) if eval_loader else None
    records = [r for r in read_metrics(run_folder) if r["step"] > span.first_step]
    watch, ending = Watch(records), Ending(span, records, train.log_every, ranks)
    run_steps = span.run_steps or num_steps
    with (
        ProgressLine(run_steps, first_step, console or Console()) as progress,
        StopSignals() as stop,
        Saver(
            run_folder,
            loaded,
            whole_plan,
            optimizer,
            train,
            log.write_save,
            progress.show_text,
            make_verifier(loaded, whole_plan, config, steps, run_folder, progress),
            config.best_by,
        ) as saver,
    ):
        evaluations = Evaluations(loaded, config, eval_steps, span, run_folder, log, progress, preference)
        # A run may have been killed between its last step and its end.
        last_step = first_step if evaluations.is_stalled else span.last_step
        pending, done = PendingSteps(), first_step
        for wait_seconds, step_data in timed(steps.iterate(first_step, last_step)):
            done = step_data.step + 1
            is_first, is_last = step_data.step == first_step, done == span.last_step
            is_saved = is_due(done, train.save_every)
            logs = is_last or evaluations.are_due(done) or is_saved or is_due(done, train.log_every)

            seed_everything(train.seed, done, ranks.rank)
            outcome = train_step(model, step_data, optimizer, device, logs, preference)
            pending.add(outcome, wait_seconds)
            saver.poll()
            stops = ranks.any(bool(stop))
            logs = logs or stops

            # Only a GPU runs ahead of its host, so that reading every step would cost time.
            if logs or is_first or device.type == "cpu":
                try:
                    pending.values = read_outcomes(pending.outcomes)[-1]
                except NonFiniteError as fault:
                    raise explain_fault(
                        fault, model, plan, optimizer, loader, train.seed, run_folder
                    ) from fault
            if is_first or is_last:
                prove(proof, done, ranks, run_folder, progress)
            if not logs:
                continue
            metrics = pending.metrics(
                optimizer.learning_rates(step_data.step),
                (done - loader.start) / loader.steps_per_epoch,
                device,
            )
            tell_step(metrics, watch, log, progress)
            if decision := ending.see(metrics):
                log.write_end(decision)
                progress.show_text(decision.text)
                if not is_last:
                    prove(proof, done, ranks, run_folder, progress)
                is_last = True
            measured = evaluations.run(done, is_last, device, stop.__bool__)
            stops = stops or ranks.any(bool(stop))
            if evaluations.is_stalled and not is_last:
                decision = Decision(done, span.name, done - span.first_step, PATIENCE)
                log.write_end(decision)
                progress.show_text(f"{decision.text}; {evaluations.stalled_text}")
                prove(proof, done, ranks, run_folder, progress)
                is_last = True
            if is_saved or stops or (is_last and not span.is_last):
                stamped = span.stamp(manifest, done, is_last)
                saver.save(stamp_manifest(stamped, done, measured.loss, measured.scores))
            if stops:
                saver.wait()
                raise stopped(ranks.gather(stop.received), run_folder, done, run_steps)
            if is_last:
                break
            pending = PendingSteps()
    return stamp_manifest(span.stamp(manifest, done, is_done=True), done)


def prove(proof: Proof, done: int, ranks: Ranks, run_folder: Path, progress: ProgressLine) -> None:
    """What trains has moved and what is frozen has not, told and in the report. All ranks must call it."""
    finding = proof.check(done)
    if ranks.is_first:
        add_to_report(run_folder, finding)
    progress.show_text(finding.message)


def make_verifier(
    loaded: LoadedModel,
    plan: PartsPlan,
    config: Config,
    steps: Shares,
    run_folder: Path,
    progress: ProgressLine,
) -> Verifier:
    """Compares checkpoints as the config says; its findings go into report.json and onto the console."""

    def note(finding: Finding) -> None:
        values = {**finding.values, "step": step_of(Path(finding.values["folder"]))}
        add_to_report(run_folder, replace(finding, values=values))
        progress.show_text(f"{Path(finding.values['folder']).name}: {finding.message}")

    def take() -> Probe | None:
        trust, takes_part = config.model.trust_remote_code, ranks.is_first or engine.shards_weights
        if not takes_part or not steps.examples:
            return None
        return take_probe(loaded, steps.examples, steps.loader.pad_token_id, trust, engine)

    engine, ranks, is_on = steps.engine, steps.engine.ranks, config.train.verify == "sample"
    quantization = quantization_of(loaded.model, plan)
    return Verifier(take if is_on else None, quantization, note, ranks.from_first)


def tell_step(metrics: StepMetrics, watch: Watch, log: MetricsLog, progress: ProgressLine) -> None:
    log.write_step(metrics)
    progress.show_step(metrics)
    for alarm in watch.see(metrics):
        log.write_alarm(metrics.step, alarm)
        progress.show_text(f"warning: step {metrics.step}: {alarm.message}")


def stopped(received: Sequence[Signals | None], run_folder: Path, done: int, num_steps: int) -> StoppedError:
    """`received` by each rank; the signal may have come to one of them only."""
    signal = next(signal for signal in received if signal)
    return StoppedError(
        f"stopped by {signal.name} after step {done} of {num_steps}; saved "
        f"{checkpoint_folder(run_folder, done)}. Go on with: {resume_command(run_folder)}",
        signal,
    )


def timed(steps: Iterator[StepData]) -> Iterator[tuple[float, StepData]]:
    """The steps, each with the seconds that it was waited for."""
    while True:
        start = time.monotonic()
        step_data = next(steps, None)
        if step_data is None:
            return
        yield time.monotonic() - start, step_data


class PendingSteps:
    """Steps since the last logged one; their numbers stay on the device until they are read together."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.data_wait_seconds = 0.0
        self.outcomes: list[StepOutcome] = []
        self.values: StepValues | None = None  # the last step's, once they were read

    def add(self, outcome: StepOutcome, wait_seconds: float) -> None:
        self.outcomes.append(outcome)
        self.data_wait_seconds += wait_seconds

    def metrics(self, learning_rates: dict[str, float], epoch: float, device: torch.device) -> StepMetrics:
        """Metrics of the last step; seconds are means, and dropped rows sums, over all pending steps."""
        values, last, num_steps = self.values, self.outcomes[-1], len(self.outcomes)
        assert values is not None, "read the outcomes first"
        zero_fractions, ratios = observed_values(last)
        return StepMetrics(
            step=last.step + 1,
            epoch=epoch,
            loss=values.loss,
            grad_norm=values.grad_norm,
            grad_norms=values.grad_norms,
            update_ratios=ratios,
            zero_gradient_fractions=zero_fractions,
            learning_rates=learning_rates,
            num_input_tokens=last.num_input_tokens,
            num_target_tokens=last.num_target_tokens,
            num_dropped=dict(sum((outcome.dropped for outcome in self.outcomes), Counter())),
            step_seconds=(time.monotonic() - self.start) / num_steps,
            data_wait_seconds=self.data_wait_seconds / num_steps,
            peak_memory_bytes=peak_memory_bytes(device),
            preference=values.preference,
        )


def observed_values(outcome: StepOutcome) -> tuple[dict[str, float], dict[str, float]]:
    """Zero-gradient shares and update ratios of the parts that the step reached; the host waits."""
    if outcome.observed is None:
        return {}, {}
    zero_fractions, ratios = outcome.observed.values.tolist()
    parts = outcome.observed.parts
    return dict(zip(parts, zero_fractions, strict=True)), dict(zip(parts, ratios, strict=True))
