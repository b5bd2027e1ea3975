"""Every engine on two and four processes against one process: curves of 20 steps, full and LoRA.

All that runs on so many processes runs in one start of them, since each start imports torch and transformers.
"""

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
from preferences import label_rows, pair_rows

from partwise.engine.ranks import Ranks

SCRIPT = Path(__file__).with_name("engines.py")
pytestmark = pytest.mark.timeout(1200)
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
    "dpo, full": (FULL, "pairs"),
    "kto, lora": ({"language_model": LORA}, "labels"),
}
OBJECTIVES = {
    "pairs": {"loss": "dpo", "beta": 1.0, "sft_weight": 0.1},
    "labels": {"loss": "kto", "beta": 1.0},
}
ON_FOUR = ("full", "lora")
SAVED = ("full", "lora")
# Which engine goes on from the checkpoint of which.
READERS = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
# KTO's other answers are aligned over ranks as its own are: where weights are in shards.
ENGINES_OF = {"kto, lora": ("fsdp",)}
NUM_STEPS = 20
SAVED_STEP = 12
NUM_FEW_STEPS = 8
ON_FEW_STEPS = ("frozen vision", "projector", "dpo, full", "kto, lora")
NUM_RESUMED_STEPS = 12
RESUMED = {"steps": NUM_RESUMED_STEPS, "save_every": 6, "keep_last": 9}
NUM_EVAL_ROWS = 8
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


def write_preferences(folder: Path, kind: str, make_image: Callable) -> Path:
    """9 rows of which some have an image; of 6 a step, the last of an epoch has 3."""
    make_image().save(folder / "red.png")
    images = [str(folder / "red.png") if row % 3 == 0 else None for row in range(9)]
    rows = pair_rows(images) if kind == "pairs" else label_rows(images)
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def configs(tiny_folder: Callable, make_image: Callable, tmp_path_factory: Any) -> Callable[..., dict]:
    folder = tmp_path_factory.mktemp("rows")
    rows = {kind: str(write_rows(folder, kind, make_image)) for kind in ("text", "images", "mixed")}
    rows |= {kind: str(write_preferences(folder, kind, make_image)) for kind in OBJECTIVES}
    evaluated = folder / "eval.jsonl"
    evaluated.write_text("".join(Path(rows["mixed"]).read_text().splitlines(keepends=True)[:NUM_EVAL_ROWS]))
    model = str(tiny_folder("gemma3"))

    def make(cell: str, output: Path, **train: Any) -> dict[str, Any]:
        parts, kind = CELLS[cell]
        return {
            "model": {"path": model, "dtype": "float32"},
            "parts": parts,
            "data": {
                "train": rows[kind],
                "eval": rows[kind] if kind in OBJECTIVES else str(evaluated),
                "max_seq_len": 256,
                "num_workers": 0,
            },
            "objective": OBJECTIVES.get(kind, {}),
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
        [*command, str(SCRIPT), str(folder / "jobs.json")], capture_output=True, text=True, timeout=1100
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
    said = [node.communicate(timeout=1100)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][:3000]


def worst(found: list, expected: list) -> tuple[float, float]:
    """The largest relative differences of losses and of gradient norms."""
    assert len(found) == len(expected) > NUM_FEW_STEPS
    losses = max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(found, expected, strict=True))
    norms = max(abs(a[1] - b[1]) / b[1] for a, b in zip(found, expected, strict=True) if b[1])
    return losses, norms


def num_steps(cell: str) -> int:
    return NUM_FEW_STEPS if cell in ON_FEW_STEPS else NUM_STEPS


@pytest.fixture(scope="module")
def on_two(configs: Callable, tmp_path_factory: Any) -> Path:
    """The folder of all that runs on two ranks; some leave a checkpoint on their way."""
    folder = tmp_path_factory.mktemp("two")
    jobs = []
    for cell in CELLS:
        train = {"save_every": SAVED_STEP} if cell in SAVED else {}
        train["steps"] = num_steps(cell)
        engines = ENGINES_OF.get(cell, ENGINES)
        jobs += [[engine, configs(cell, folder / f"{engine}-{cell}", **train), 0] for engine in engines]
    offloaded = configs("full", folder / "offloaded", offload_optimizer=True, **RESUMED)
    jobs += [["fsdp", offloaded, 0], ["fsdp", offloaded, 6]]
    run_on_ranks(2, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def on_three(configs: Callable, on_two: Path, tmp_path_factory: Any) -> Path:
    """Each checkpoint of `on_two`, gone on from with another engine on three ranks."""
    folder = tmp_path_factory.mktemp("three")
    jobs = []
    for cell in SAVED:
        for engine, reader in READERS.items():
            output = shutil.copytree(on_two / f"{engine}-{cell}", folder / f"{engine}-{cell}")
            jobs.append([reader, configs(cell, output, save_every=SAVED_STEP), SAVED_STEP])
    run_on_ranks(3, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def on_four(configs: Callable, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("four")
    outputs = {(engine, cell): folder / f"{engine}-{cell}" for engine in ENGINES for cell in ON_FOUR}
    run_on_ranks(4, [[engine, configs(cell, out), 0] for (engine, cell), out in outputs.items()], folder)
    return folder


def assert_same(folder: Path, expected: list) -> None:
    losses, norms = worst(curve(folder), expected)
    assert losses < 1e-4 and norms < 1e-3, (losses, norms)


@pytest.mark.parametrize(
    ("cell", "engine"), [(cell, engine) for cell in CELLS for engine in ENGINES_OF.get(cell, ENGINES)]
)
def test_two_ranks_have_the_curve_of_one(cell, engine, on_two, references):
    assert_same(on_two / f"{engine}-{cell}", references(cell, num_steps(cell)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", ON_FOUR)
def test_four_ranks_have_the_curve_of_one(cell, engine, on_four, references):
    assert_same(on_four / f"{engine}-{cell}", references(cell))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", SAVED)
def test_a_run_goes_on_with_another_engine_and_number_of_ranks(
    cell, engine, configs, on_two, on_three, references, tmp_path
):
    """From the checkpoint of an engine on two ranks: another engine on three ranks, and one process."""
    assert_same(on_three / f"{engine}-{cell}", references(cell))
    alone = shutil.copytree(on_two / f"{engine}-{cell}", tmp_path / "alone")
    train_curve("single", configs(cell, alone, save_every=SAVED_STEP), Ranks(), SAVED_STEP)
    assert_same(alone, references(cell))


def test_an_offloaded_optimizer_changes_no_number(on_two, references):
    """Also through a checkpoint. On a CPU shards have no other place, but all goes through the policy."""
    assert_same(on_two / "offloaded", references("full", NUM_RESUMED_STEPS))


def test_fsdp_shards_within_a_node_and_copies_across(configs, references, tmp_path):
    """Also through a checkpoint, whose shards are there twice."""
    values = configs("full", tmp_path / "run", **RESUMED)
    run_on_nodes([["fsdp", values, 0], ["fsdp", values, 6]], tmp_path)
    assert_same(tmp_path / "run", references("full", NUM_RESUMED_STEPS))
