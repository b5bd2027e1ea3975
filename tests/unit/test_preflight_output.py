"""The checks of the config and of what the output folder holds: a new run, one to go on with, or neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from partwise.config import dump_config, load_config
from partwise.errors import CheckpointError, ConfigError
from partwise.preflight import Context, output
from partwise.preflight.output import check_config
from partwise.preflight.resume import check_resume
from partwise.training.job import Job

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))
MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> MakeContext:
    def make(*overrides: str) -> Context:
        path = tmp_path / "config.yaml"
        path.write_text(
            f"model: {{path: {tiny_folder('llama')}}}\nparts: {{language_model: lora}}\n"
            f"data: {{train: rows.jsonl}}\noutput: {tmp_path / 'run'}\n"
        )
        return Context(Job(load_config(path, overrides)))

    return make


def write_run(context: Context) -> Path:
    """What `train` writes before the first step."""
    folder = Path(context.config.output)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(context.config))
    (folder / "plan.json").write_text(json.dumps(asdict(context.job.plan)))
    return folder


def test_a_new_output_is_a_new_run(make_context: MakeContext) -> None:
    (finding,) = check_resume(make_context())
    assert finding.level == "info" and "a new one starts at step 1" in finding.message


def test_a_run_of_the_same_config_can_be_resumed_and_a_finished_one_stays(make_context: MakeContext) -> None:
    folder = write_run(context := make_context())
    (finding,) = check_resume(make_context("train.log_every=7"))
    assert finding.level == "info" and "--resume goes on from step 1: it has no whole" in finding.message
    checkpoint = folder / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "partwise.json").write_text('{"step": 100}')
    (finding,) = check_resume(context)
    assert finding.message.endswith(f"--resume goes on from {checkpoint}")
    (folder / "final").mkdir()
    (folder / "final" / "partwise.json").write_text("{}")
    (finding,) = check_resume(context)
    assert finding.level == "info" and "holds a finished run" in finding.message


def test_a_run_of_another_config_is_a_warning_with_the_keys(make_context: MakeContext) -> None:
    write_run(make_context())
    (finding,) = check_resume(make_context("train.seed=3"))
    assert finding.level == "warning" and "train.seed was 0, is 3" in finding.message


def test_files_of_anything_else_are_a_warning(make_context: MakeContext) -> None:
    context = make_context()
    folder = Path(context.config.output)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (finding,) = check_resume(context)
    assert finding.level == "warning"
    assert "holds no run to go on with. Choose another output" in finding.message


def test_a_run_with_another_plan_cannot_be_resumed(make_context: MakeContext) -> None:
    folder = write_run(context := make_context())
    plan = json.loads((folder / "plan.json").read_text())
    gone = plan["parts"][0]["trainable"].pop()
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=f"1 differ, such as {gone}"):
        check_resume(context)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_reads_back_as_the_same(example: Path) -> None:
    (finding,) = check_config(Context(Job(load_config(example))))
    assert finding.level == "info"


def test_a_config_that_reads_back_as_another_one_is_an_error(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        output, "dump_config", lambda config: dump_config(config).replace("seed: 0", "seed: 1")
    )
    with pytest.raises(ConfigError, match="not the same when it is read"):
        check_config(make_context())
