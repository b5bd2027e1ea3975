"""The command line: one command is one call.

Nothing heavy is imported before the command is known, so `partwise --help` answers at once. Faults of the
user are printed as one paragraph on stderr with exit code 1; a traceback is always a fault of ours.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from partwise.errors import StoppedError, UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="partwise",
    help="Fine-tune multimodal language models part by part, and know exactly what trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=100.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that ships in the model folder.")
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--num-processes", min=1, help="Processes on this machine; default: one for each visible GPU."
    ),
]
AcceptBase = Annotated[
    bool, typer.Option("--accept-base", help="Go on though the base is not the one an adapter is of.")
]


def console(quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=quiet)


def with_accepted(overrides: list[str] | None, accept_base: bool) -> list[str]:
    return [*(overrides or []), *(["model.accept_base=true"] if accept_base else [])]


@contextmanager
def quick_imports() -> Iterator[None]:
    """A block of imports that the cycle collector does not interrupt: torch and transformers make half a
    million objects that all stay, and looking through them took 0.5 of 4 seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    num_processes: NumProcesses = None,
    accept_base: AcceptBase = False,
) -> None:
    """Check the config, train, and write the run folder with final/ in it."""
    with quick_imports():
        from partwise.config import load_config
        from partwise.engine.join import joined
        from partwise.engine.launch import (
            check_num_processes,
            choose_num_processes,
            resolve_engine,
            started_ranks,
        )
        from partwise.engine.spawn import launch

    started = started_ranks()
    if started is None:
        settings = load_config(config, with_accepted(overrides, accept_base))
        number = choose_num_processes(settings.engine, num_processes)
        if number > 1:
            raise typer.Exit(launch(number, sys.argv[1:]))
    else:
        check_num_processes(started, num_processes)
    with quick_imports():
        from partwise import run

    # Whatever is wrong from here on is said by one of the processes.
    with joined(started) as ranks:
        settings = load_config(config, with_accepted(overrides, accept_base))
        resolve_engine(settings.engine, ranks.size)
        run.train(settings, resume=resume, console=console(quiet=not ranks.is_first), ranks=ranks)


@app.command()
def check(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML config file.")] = None,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Read every row instead of a sample.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Id of a check; may repeat.")] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Id of a check; may repeat.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the findings as JSON, too.")] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="Print the checks and their ids.")] = False,
    num_processes: NumProcesses = None,
    accept_base: AcceptBase = False,
) -> None:
    """Say whether this run will learn what its config says, without training."""
    if list_checks:
        with quick_imports():
            from partwise import show

        show.print_checks(console())
        return
    if config is None:
        raise UserError("check needs a config file, or --list. Write: partwise check CONFIG.")
    with quick_imports():
        from partwise import run
        from partwise.config import load_config

    settings = load_config(config, with_accepted(overrides, accept_base))
    findings = run.check(settings, full, only or (), skip or (), report, console(), num_processes)
    if run.has_errors(findings):
        raise typer.Exit(1)


@app.command()
def cache(config: ConfigPath, overrides: Overrides = None) -> None:
    """Keep what the frozen vision tower makes of every image, so that training runs without it."""
    with quick_imports():
        from partwise import run
        from partwise.config import load_config

    settings = load_config(config, overrides or [])
    console().print(f"filled {run.cache(settings, console())}")


@app.command()
def parts(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or a config file.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the parts of a model, without loading its weights; with a config, what each of them does."""
    with quick_imports():
        from partwise import show

    show.print_parts(model, trust_remote_code, console())


@app.command()
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", min=0, help="Row of the training data, from 0; may repeat.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the rows, or the first 8, and images.")
    ] = None,
) -> None:
    """Show rows as the model sees them: rendered, trained tokens coloured, images and counts."""
    with quick_imports():
        from partwise import show
        from partwise.config import load_config

    settings = load_config(config, overrides or [])
    if html:
        show.write_preview(settings, row or [], html)
        console().print(f"wrote {html}")
        return
    for number in row or [0]:
        show.print_preview(settings, number, console())


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run, model or adapter folders.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    to: Annotated[
        Literal["hf", "adapter", "gguf"],
        typer.Option("--to", help="A whole model, adapters merged; the PEFT adapter; or GGUF files."),
    ] = "hf",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W...", help="Shares of several adapters.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option("--dtype", help="Default: the base's.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file; default 5GB.")
    ] = None,
    verify: Annotated[
        Literal["sample", "off"],
        typer.Option("--verify", help="Compare with what was trained in a fresh process, or not."),
    ] = "sample",
    converter: Annotated[
        Path | None, typer.Option("--converter", help="llama.cpp's convert_hf_to_gguf.py, for --to gguf.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    accept_base: AcceptBase = False,
) -> None:
    """Write what runs trained as a folder that other tools load."""
    with quick_imports():
        from partwise.export.folder import ExportOptions, export_runs, parse_weights

    options = ExportOptions(
        to=to,
        weights=parse_weights(weights),
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify == "sample",
        trust_remote_code=trust_remote_code,
        accept_base=accept_base,
        converter=converter,
    )
    path = export_runs(runs, out, options, console())
    console().print(f"wrote {path}")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model, adapter or run folder.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Image to ask about; may repeat.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask once and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    trust_remote_code: TrustRemoteCode = False,
    accept_base: AcceptBase = False,
) -> None:
    """Talk to a model; the answer streams."""
    with quick_imports():
        from partwise.serve.chat import run_chat

    images = [str(path) for path in image or []]
    run_chat(model, images, prompt, max_new_tokens, trust_remote_code, accept_base)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model, adapter or run folder.")],
    data: Annotated[
        list[Path], typer.Option("--data", help="Rows to answer: .jsonl, .json or .parquet; may repeat.")
    ],
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="NAME,NAME", help="Or path/to/file.py:function.")
    ] = "exact_match",
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="MODEL", help="Compare with this model's answers.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for samples.jsonl and samples.html.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Ask about a sample of so many rows, instead of all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows answered at once.")] = 16,
    budget_seconds: Annotated[
        float | None, typer.Option("--budget-seconds", help="Begin no batch of rows later than this.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option("--group-by", metavar="KEY", help="A row of means for each of its values.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Ask about other images and blank ones, too.")
    ] = False,
    loss: Annotated[bool, typer.Option("--loss/--no-loss", help="The loss on the rows, too.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which rows are the sample.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    accept_base: AcceptBase = False,
) -> None:
    """Judge a model by what it answers."""
    with quick_imports():
        from partwise.serve.evaluate import EvalOptions
        from partwise.serve.evaluate import evaluate as judge

    options = EvalOptions(
        metrics=tuple(name.strip() for name in metrics.split(",")),
        max_rows=rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        budget_seconds=budget_seconds,
        group_by=group_by,
        control=control,
        with_loss=loss,
        seed=seed,
        trust_remote_code=trust_remote_code,
        accept_base=accept_base,
    )
    judge(model, data, options, baseline, out, console())


@app.command()
def lineage(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Run, model or adapter folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the weights of all ancestors that are here, and compare.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw it, too, as a .png or .svg file.")
    ] = None,
) -> None:
    """Print what a folder was made from, as a tree."""
    with quick_imports():
        from partwise import show

    show.print_lineage(folder, verify, picture, console())


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run folders.")],
    axis: Annotated[
        Literal["steps", "tokens"], typer.Option("--x", help="Steps, or target tokens trained on.")
    ] = "steps",
    smoothing: Annotated[
        float, typer.Option("--smooth", min=0, max=1, help="Share of the steps that smoothed lines average.")
    ] = 0.05,
) -> None:
    """Draw one run, or several over each other: a picture and an interactive page in plots/ of the first."""
    from partwise.plots import plot_runs

    for path in plot_runs(runs, axis, smoothing):
        console().print(f"wrote {path}")


@app.command("find-lr")
def find_lr(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of a sweep.")] = 100,
    low: Annotated[float, typer.Option("--low", help="Rate of its first step.")] = 1e-7,
    high: Annotated[float, typer.Option("--high", help="Rate of its last step.")] = 1.0,
    together: Annotated[
        bool, typer.Option("--together", help="All parts at once, with one rate; else each part alone.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default: that of the run, with -find-lr.")
    ] = None,
) -> None:
    """Suggest a learning rate for each part: train a copy with a growing rate, and see what the loss does."""
    with quick_imports():
        from partwise.config import load_config
        from partwise.rates.report import find_rates

    settings = load_config(config, overrides or [])
    find_rates(settings, console(), steps, low, high, together, out)


@app.command()
def schema() -> None:
    """Print the config's JSON schema, for editors."""
    import json

    from partwise.config import config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command()
def tiny(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Such as gemma3, llava-next, qwen2.5-vl, llama.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; must be empty or new.")],
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a tiny random model of a family as a whole Hugging Face folder, for trying configs."""
    with quick_imports():
        from partwise.tiny import write_tiny

    console().print(f"wrote {write_tiny(family, folder, seed=seed)}")


def main() -> None:
    """The entry point: user faults as text, exit code 1; an interrupt as 130, SIGTERM in training as 143."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Where one of several processes ends, torch's C++ side writes a page about its socket in the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = exit_code()
    join = sys.modules.get("partwise.engine.join")
    if join and join.has_connected:
        # Communication libraries end threads while Python ends, and abort the process now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code() -> int:
    """Of the command, once it has run."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
