"""Every engine on two and four processes against one process: curves of 20 steps, full and LoRA."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engines import curve, train_curve

from partwise.engine.ranks import Ranks

SCRIPT = Path(__file__).with_name("engines.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
LORA = {"mode": "lora", "lora_rank": 4}
FULL = {"vision_tower": "full", "projector": "full", "language_model": "full"}
# Plan and rows: text, images, or both. The embeddings of the tiny model are tied to its head.
CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "full": (FULL, "mixed"),
    "full, text": (FULL, "text"),
    "full, images": (FULL, "images"),
    "frozen vision": ({"language_model": "full"}, "mixed"),
    "projector": ({"projector": "full"}, "mixed"),
    "lora": ({"vision_tower": LORA, "projector": "full", "language_model": LORA}, "mixed"),
    "lora, text": ({"language_model": LORA}, "text"),
    "lora, images": ({"projector": "full", "language_model": LORA}, "images"),
}
ON_FOUR = ("full", "lora")
NUM_STEPS = 20
NUM_RESUMED_STEPS = 12
NUM_FEW_STEPS = 8
ON_FEW_STEPS = ("frozen vision", "projector")
WORDS = ("red", "a green disc", "It is blue, as far as one can see.", "7")


def write_rows(folder: Path, kind: str, make_image: Callable) -> Path:
    """20 rows of unlike lengths; of 6 a step, the last of an epoch has 2: some ranks have none."""
    lines = []
    for row in range(20):
        content: list[dict[str, str]] = [{"type": "text", "text": "What is it? " * (1 + row % 4)}]
        if kind == "images" or (kind == "mixed" and row % 3 == 0):
            for number in range(1 + row % 2):
                path = folder / f"{row}-{number}.png"
                make_image((56 + 14 * (row % 2), 56), ("red", "green", "blue")[(row + number) % 3]).save(path)
                content.insert(0, {"type": "image", "image": str(path)})
        answer = [{"type": "text", "text": WORDS[row % 4]}]
        lines.append(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
        )
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def configs(tiny_folder: Callable, make_image: Callable, tmp_path_factory: Any) -> Callable[..., dict]:
    folder = tmp_path_factory.mktemp("rows")
    rows = {kind: str(write_rows(folder, kind, make_image)) for kind in ("text", "images", "mixed")}
    model = str(tiny_folder("gemma3"))

    def make(cell: str, output: Path, **train: Any) -> dict[str, Any]:
        parts, kind = CELLS[cell]
        return {
            "model": {"path": model, "dtype": "float32"},
            "parts": parts,
            "data": {"train": rows[kind], "eval": rows["mixed"], "max_seq_len": 256, "num_workers": 0},
            "train": {
                "steps": NUM_STEPS,
                "global_batch_size": 6,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 3,
                "verify": "off",
                **train,
            },
            "output": str(output),
        }

    return make


@pytest.fixture(scope="module")
def references(configs: Callable, tmp_path_factory: Any) -> Callable[[str], list]:
    """The curve of one process, once for each cell and number of steps."""
    made: dict[tuple[str, int], list] = {}
    folder = tmp_path_factory.mktemp("single")

    def reference(cell: str, steps: int = NUM_STEPS) -> list:
        if (cell, steps) not in made:
            values = configs(cell, folder / f"{cell}-{steps}", steps=steps)
            made[cell, steps] = curve(train_curve("single", values, Ranks()))
        return made[cell, steps]

    return reference


def run_on_ranks(num_ranks: int, jobs: list, folder: Path) -> None:
    """All jobs, one after the other, on so many processes."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", str(num_ranks)]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder / "jobs.json")], capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[:3000]


def run_on_nodes(jobs: list, folder: Path) -> None:
    """The same on two nodes of two processes, as far as the processes can tell."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [
                *(*TORCHRUN, *meeting, "--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(node)),
                *(str(SCRIPT), str(folder / "jobs.json")),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=540)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][:3000]


def worst(found: list, expected: list) -> tuple[float, float]:
    """The largest relative differences of losses and of gradient norms."""
    assert len(found) == len(expected) > NUM_FEW_STEPS
    losses = max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(found, expected, strict=True))
    norms = max(abs(a[1] - b[1]) / b[1] for a, b in zip(found, expected, strict=True) if b[1])
    return losses, norms


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_curves_are_those_of_one_process(num_ranks, configs, references, tmp_path):
    cells = CELLS if num_ranks == 2 else ON_FOUR
    steps = {cell: NUM_FEW_STEPS if cell in ON_FEW_STEPS else NUM_STEPS for cell in cells}
    outputs = {(engine, cell): tmp_path / f"{engine}-{cell}" for engine in ENGINES for cell in cells}
    jobs = [[e, configs(cell, out, steps=steps[cell]), 0] for (e, cell), out in outputs.items()]
    run_on_ranks(num_ranks, jobs, tmp_path)
    for (engine, cell), output in outputs.items():
        losses, norms = worst(curve(output), references(cell, steps[cell]))
        assert losses < 1e-4 and norms < 1e-3, (engine, cell, losses, norms)


@pytest.mark.parametrize("cell", ["full", "lora"])
def test_a_run_goes_on_with_another_engine_and_number_of_ranks(cell, configs, references, tmp_path):
    """Each engine on two ranks writes a checkpoint; one process and other engines on three go on from it."""
    train = {"steps": NUM_RESUMED_STEPS, "save_every": 6, "keep_last": 9}
    written = {engine: tmp_path / engine for engine in ENGINES}
    jobs = [[engine, configs(cell, output, **train), 0] for engine, output in written.items()]
    run_on_ranks(2, jobs, tmp_path)
    three = []
    for engine, reader in zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True):
        shutil.copytree(written[engine], tmp_path / f"{engine}-{reader}")
        three.append([reader, configs(cell, tmp_path / f"{engine}-{reader}", **train), 6])
        train_curve("single", configs(cell, written[engine], **train), Ranks(), 6)
    run_on_ranks(3, three, tmp_path)
    for _, values, _ in [*jobs, *three]:
        losses, norms = worst(curve(Path(values["output"])), references(cell, NUM_RESUMED_STEPS))
        assert losses < 1e-4 and norms < 1e-3, (values["output"], losses, norms)


def test_an_offloaded_optimizer_changes_no_number(configs, references, tmp_path):
    """Also through a checkpoint. On a CPU shards have no other place, but all goes through the policy."""
    train = {"steps": NUM_RESUMED_STEPS, "save_every": 6, "keep_last": 9, "offload_optimizer": True}
    values = configs("full", tmp_path / "run", **train)
    run_on_ranks(2, [["fsdp", values, 0], ["fsdp", values, 6]], tmp_path)
    losses, norms = worst(curve(tmp_path / "run"), references("full", NUM_RESUMED_STEPS))
    assert losses < 1e-4 and norms < 1e-3


def test_fsdp_shards_within_a_node_and_copies_across(configs, references, tmp_path):
    """Also through a checkpoint, whose shards are there twice."""
    train = {"steps": NUM_RESUMED_STEPS, "save_every": 6, "keep_last": 9}
    values = configs("full", tmp_path / "run", **train)
    run_on_nodes([["fsdp", values, 0], ["fsdp", values, 6]], tmp_path)
    losses, norms = worst(curve(tmp_path / "run"), references("full", NUM_RESUMED_STEPS))
    assert losses < 1e-4 and norms < 1e-3
