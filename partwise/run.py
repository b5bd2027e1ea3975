"""A config -> a trained run: checks, plan, training, final/.

`train` writes the run folder; `check` only looks. A run folder is never written over: the same output
again is an error, or goes on from its newest whole checkpoint with resume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from partwise.config import Config, dump_config
from partwise.engine.choose import make_engine, needs_group, runs_compiled
from partwise.engine.device import free_memory
from partwise.engine.join import connected_alone, joined
from partwise.engine.launch import choose_num_processes, let_segments_grow, resolve_engine, started_ranks
from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine
from partwise.errors import CheckpointError, ConfigError, TrainingError
from partwise.lineage.manifest import read_manifest
from partwise.lineage.publish import replace_folder
from partwise.lineage.verify import start_verification
from partwise.model.compile import compile_layers, forget_compiled
from partwise.model.load import LoadedModel
from partwise.model.memory import recompute_layers
from partwise.model.quantize import quantization_of
from partwise.plots import plot_runs
from partwise.preflight import (
    CHECKS,
    MODEL_CHECKS,
    Context,
    collect_findings,
    find,
    has_errors,
    select_checks,
)
from partwise.preflight.memory import chosen_share, fits_alone
from partwise.preflight.resume import find_start
from partwise.preflight.stages import find_named, forecast
from partwise.records import Finding
from partwise.tables import findings_text, held_lines, plan_table
from partwise.trackers.tracking import Tracking
from partwise.training.checkpoint import (
    checkpoint_folder,
    model_state,
    save_final,
    step_of,
    torn_checkpoints,
)
from partwise.training.fill import fill_cache
from partwise.training.job import Job
from partwise.training.loop import run_stage
from partwise.training.probe import probe_examples, take_probe
from partwise.training.proof import add_to_report
from partwise.training.reference import fill_references, open_preference, reference_source
from partwise.training.span import Finished, finished_stages
from partwise.training.stages import open_job
from partwise.training.tracked import opened_tracking

CHECKED_ROWS = 256
CHECKED_ROWS_BEFORE_TRAINING = 32
UNCHECKED = (
    "a step takes more memory than one rank has, so that none was tried before the training; that gradients "
    "reach what trains, and nothing else, is proven after the first step"
)


def check(
    config: Config,
    full: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    report: Path | None = None,
    console: Console | None = None,
    num_processes: int | None = None,
) -> list[Finding]:
    """All findings, printed as paragraphs; nothing is written but `report`, a JSON file of the same content.

    `full` reads every row instead of a sample; `only` and `skip` are ids of checks. Memory is judged for the
    engine on `num_processes`, or one for each visible GPU; everything else is tried in this process.

    Raises:
        ConfigError: an id is unknown, or the report cannot be written.
    """
    let_segments_grow()
    console = console or Console(quiet=True)
    cheap, dear = select_checks(only, skip)
    number = choose_num_processes(config.engine, num_processes)
    engine = resolve_engine(config.engine, number)
    context = Context(open_job(config, only_looks=True), None if full else CHECKED_ROWS, engine, number)
    findings = collect_findings(context, cheap)
    if not has_errors(findings):
        show_plan(context.job, console)
        for stage in context.stages:
            if (number == 1 and not config.train.offload_optimizer) or fits_alone(stage):
                findings += collect_findings(stage, dear)
            else:
                findings += find_named(unchecked, stage)
            if len(context.stages) > 1:
                stage.let_go()
        show_forecast(context, findings, console)
    if report:
        write_report(report, findings)
    console.print(findings_text(findings), end="")
    return findings


def cache(config: Config, console: Console | None = None) -> Path:
    """Fill the feature cache that the config names with all images of its rows, and its reference cache with
    the log-probabilities of all answers; the folder with the first of them.

    What is there is read and checked, and made again where it is damaged.

    Raises:
        ConfigError: the config names none, or the model's features cannot be kept.
        DataError: a row or an image cannot be used.
        TrainingError: the disk refuses.
    """
    job = open_job(config)
    console = console or Console(quiet=True)
    objective = config.objective
    if job.store is None and objective.reference_cache is None:
        raise ConfigError(
            "there is no data.feature_cache, and no objective.reference_cache. Name a folder: "
            "data.feature_cache=FOLDER."
        )
    if job.store is not None:
        fill_cache(job, console, again=True)
    if objective.reference_cache is not None and reference_source(job, "single") == "precomputed":
        fill_references(job, Engine(), job.open_model(), console)
    return job.store.folder if job.store is not None else Path(objective.reference_cache or "")


def train(
    config: Config, resume: bool = False, console: Console | None = None, ranks: Ranks | None = None
) -> Path:
    """Check, train, and return the run's final/ folder. A run that cannot learn does not start.

    `ranks` are the processes that train; None means those that a launcher such as torchrun started, each of
    which must call this, or this one alone. It starts none. An error on one of several ranks ends them all.

    Raises:
        UserError: as the checks and the training say; the run folder is made only after all checks passed.
        StoppedError: SIGTERM or SIGINT ended the training; it can be resumed.
    """
    if ranks is None:
        let_segments_grow()
        with joined(started_ranks()) as ranks:
            return train(config, resume, console, ranks)
    name = resolve_engine(config.engine, ranks.size)
    with connected_alone() if needs_group(name) and ranks.size == 1 else nullcontext():
        engine = make_engine(name, ranks, config.train.offload_optimizer)
        return train_with(engine, config, resume, console)


def train_with(engine: Engine, config: Config, resume: bool, console: Console | None) -> Path:
    """`train`, once the processes are connected."""
    ranks = engine.ranks
    console = (console if ranks.is_first else None) or Console(quiet=True)
    job, folder = open_job(config, ranks), Path(config.output)
    start, loaded = None, None
    if ranks.is_first:
        start, loaded = prepare(job, engine, folder, resume, console)
    else:
        fill_cache(job, console)
    checkpoint, manifest, shares, finished = ranks.from_first(start)
    with opened_tracking(job, step_of(checkpoint) if checkpoint else 0, console) as tracking:
        while True:
            stage = job.stage_after(finished, checkpoint)
            loaded = loaded or open_for(stage, engine)
            manifest = train_opened(
                stage, engine, loaded, shares[stage.index], manifest, checkpoint, console, tracking
            )
            if stage.span.is_last:
                break
            ranks.barrier()  # until the first has written the checkpoint
            checkpoint, finished = checkpoint_folder(folder, manifest["step"]), finished_stages(manifest)
            if runs_compiled(engine.name) and stage.compiles:
                forget_compiled()
            loaded, engine = None, make_engine(engine.name, ranks, config.train.offload_optimizer)
            free_memory()
    job, final = stage, folder / "final"
    state = model_state(loaded, job.whole_plan, engine)
    if ranks.is_first:
        save_final(folder, loaded, job.whole_plan, manifest, state)
        plot_runs([folder])
    del state
    console.print(f"wrote {final}")
    if config.train.verify == "sample":
        verify_final(final, job, loaded, engine, console)
    return final


def train_opened(
    job: Job,
    engine: Engine,
    loaded: LoadedModel,
    recomputed_share: float,
    manifest: dict[str, Any],
    checkpoint: Path | None,
    console: Console,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Spread the model over the ranks and train it to the end of the run; the manifest, stamped."""
    number, total = recompute_layers(loaded.model, job.plan, recomputed_share)
    if 0 < number < total:
        console.print(f"{number} of {total} layers are recomputed in the backward pass, to fit into memory")
    engine.spread(loaded.model, job.plan, loaded.dtype, job.device)
    if runs_compiled(engine.name) and job.compiles:
        compile_layers(loaded.model)
        console.print("layers are compiled when they first run: the first step takes about a minute")
    return run_stage(
        loaded,
        job.plan,
        job.config,
        job.loader,
        job.eval_loader,
        Path(job.config.output),
        job.num_steps,
        manifest,
        checkpoint,
        console,
        engine,
        job.span,
        job.whole_plan,
        tracking,
        partial(open_preference, job, engine, loaded, console),
    )


class Start(NamedTuple):
    """What the first rank found: where to go on from, what the checkpoints are, the share of layers that each
    stage recomputes, and the stages that had ended."""

    checkpoint: Path | None
    manifest: dict[str, Any]
    recomputed_shares: list[float]
    finished: list[Finished]


def prepare(
    job: Job, engine: Engine, folder: Path, resume: bool, console: Console
) -> tuple[Start, LoadedModel | None]:
    """All checks, and the run folder once they have passed; where to start, and the model if it is open.

    Raises:
        UserError: as the checks say.
    """
    config = job.config
    checkpoint = find_start(folder, config, resume)
    for torn in torn_checkpoints(folder):
        console.print(f"passed over: {torn}, torn by a kill; the next checkpoint sweeps it")
    context = Context(job, CHECKED_ROWS_BEFORE_TRAINING, engine.name, engine.num_sharing)
    findings = [finding for check in CHECKS for finding in find(check, context)]
    show_plan(job, console)
    if engine.ranks.size > 1:
        console.print(f"engine {engine.name} on {engine.ranks.size} processes")
    if job.config.data.feature_cache is not None:
        if has_errors(findings):
            refuse_errors(findings, console)
        fill_cache(job, console)
    # The first stage last: its model stays open for the training.
    for stage in reversed(context.stages):
        fits = not engine.shards_weights or fits_alone(stage)
        for check in MODEL_CHECKS if fits else [unchecked]:
            findings += find_named(check, stage)
        if stage is not context.stages[0]:
            stage.let_go()
    refuse_errors(findings, console)
    show_forecast(context, findings, console)
    write_run_folder(folder, job, findings)
    if resume:
        console.print(f"resuming from {checkpoint or 'the start: there is no whole checkpoint'}")
    shares = [chosen_share(stage) for stage in context.stages]
    saved = read_manifest(checkpoint) if checkpoint else None
    start = Start(checkpoint, job.manifest, shares, finished_stages(saved))
    if checkpoint and len(context.stages) > 1:
        context.stages[0].let_go()
        return start, None
    first = context.stages[0]
    return start, first.loaded if fits else first.job.open_model(torch.device("cpu"))


def unchecked(context: Context) -> list[Finding]:
    return [Finding("step", "info", UNCHECKED, context.config.where("engine"))]


def open_for(job: Job, engine: Engine) -> LoadedModel:
    """The model, where no check has opened it."""
    if not engine.shards_weights:
        return job.open_model()
    return job.open_model(torch.device("cpu")) if engine.ranks.is_first else job.open_skeleton()


def verify_final(final: Path, job: Job, loaded: LoadedModel, engine: Engine, console: Console) -> None:
    """Print what a fresh process says of RUN/final, and add it to the report. All ranks must call it.

    Raises:
        CheckpointError: it is not the trained model; it is kept beside, so that the run counts as unfinished.
    """
    if not (engine.ranks.is_first or engine.shards_weights):
        return
    examples = probe_examples(job.loader)
    if not examples:
        console.print(f"warning: {final} was not verified: none of the first rows gives an example")
        return
    trust = job.config.model.trust_remote_code
    probe = take_probe(loaded, examples, job.pad_token_id, trust, engine)
    if not engine.ranks.is_first:
        return
    try:
        quantization = {str(final): quantization_of(loaded.model, job.plan)}
        finding = start_verification(final, probe, quantization=quantization).finish()
    except CheckpointError as error:
        aside = final.with_name("final-refused")
        replace_folder(final, aside)
        raise CheckpointError(f"{error} It stands at {aside} now.") from error
    add_to_report(final.parent, finding)
    console.print(finding.message)


def refuse_errors(findings: list[Finding], console: Console) -> None:
    """Raises: TrainingError with the texts of all findings that are errors. Warnings are printed."""
    if warnings := [finding for finding in findings if finding.level == "warning"]:
        console.print(findings_text(warnings), end="")
    if errors := [finding for finding in findings if finding.level == "error"]:
        texts = [" ".join(filter(None, (f.message + ".", f.where and f"({f.where})", f.fix))) for f in errors]
        raise TrainingError("the run does not start: " + " ".join(texts))


def show_plan(job: Job, console: Console) -> None:
    if job.config.expanded_flags:
        console.print(job.config.expanded_flags)
    console.print(plan_table(job.plan))
    for line in held_lines(job.plan):
        console.print(line)


def show_forecast(context: Context, findings: list[Finding], console: Console) -> None:
    if (table := forecast(context, findings)) is not None:
        console.print(table)


def write_run_folder(folder: Path, job: Job, findings: list[Finding]) -> None:
    """config.yaml, plan.json and report.json, before the first step."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(job.config))
        (folder / "plan.json").write_text(json.dumps(told_plan(job), indent=2) + "\n")
        (folder / "report.json").write_text(report_text(findings))
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {error}. Choose another output.") from error


def told_plan(job: Job) -> dict[str, Any]:
    """The plan; where there are stages that of all together, and those of each."""
    plan = asdict(job.plan)
    if job.stages[0] is not job:
        plan["stages"] = [
            {"name": stage.name, "num_steps": stage.num_steps, **asdict(stage.plan)} for stage in job.stages
        ]
    return plan


def write_report(path: Path, findings: Sequence[Finding]) -> None:
    try:
        path.write_text(report_text(findings))
    except OSError as error:
        raise ConfigError(f"--report {path} cannot be written: {error}. Choose another file.") from error


def report_text(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings], indent=2) + "\n"
