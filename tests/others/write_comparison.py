"""The comparison page, from what the cases observe when they run.

    python tests/others/write_comparison.py > docs/comparison.md
    python tests/others/write_comparison.py --short      # the table in README.md

In: nothing. Out: Markdown. Every number and every quoted message comes from the run that wrote the page.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import cases_folders
import cases_gradients
import cases_losses
import cases_models
import cases_numbers
import cases_parts
import cases_pictures
import cases_rows
import cases_runs
import torch
from bench import Bench, Row

Case = Callable[[Bench], Row]

SECTIONS: dict[str, tuple[Case, ...]] = {
    "What trains": (*cases_parts.CASES, *cases_gradients.CASES),
    "What a row becomes": (*cases_rows.CASES, *cases_pictures.CASES),
    "What a step computes": (*cases_numbers.CASES, *cases_losses.CASES),
    "What is saved and loaded": (*cases_folders.CASES, *cases_models.CASES),
    "What a run starts from": cases_runs.CASES,
}
CASES = tuple(case for cases in SECTIONS.values() for case in cases)

SHORT = (
    cases_parts.everything_frozen_with_checkpointing,
    cases_parts.lora_by_suffix,
    cases_folders.adapter_without_projector,
    cases_rows.images_in_another_row,
    cases_rows.image_tokens_as_labels,
    cases_numbers.accumulation,
    cases_numbers.bfloat16_updates,
    cases_folders.full_model_saved_alone,
)

HEAD = """\
# What plain transformers does, and what Partwise does

Each line below is a test in `tests/others/`, which brings about the situation twice: plain, and in Partwise.
"Plain" means transformers, PEFT and torch with nothing in between: `from_pretrained`, `get_peft_model`, the
processor, the model's own loss, `torch.optim.AdamW` and `Trainer`. Tools that stand on them may catch some
of it themselves.

Five failures that cost people days have an end-to-end test of their own, `tests/e2e/test_stories.py`, in
which the commands meet the setup that went wrong:

- **Everything frozen.** `finetuning_type: full` and all three freeze flags under DeepSpeed, ZeRO-2 or
  ZeRO-3: `IndexError: list index out of range`, or an `AssertionError` without text. Here: an error before
  weights are looked for, with the three lines and the usual recipe.
- **Gradients that do not arrive.** Adapters on the vision tower, checkpointing, a hook on the text embeddings
  alone: the tower's gradients are `None`, and training goes on. Here: the same losses and gradient norms with
  and without checkpointing, and a proof that every tensor moved.
- **Flags that contradict.** `train_mm_proj_only` beside `freeze_multi_modal_projector`: the one that is read
  last wins. Here: an error that names both.
- **A loss that starts at 70.** Multiplied by the batches that are accumulated. Here: one number for every
  split; and where a trained model's first loss is too high, `partwise check` tries the usual causes and names
  the one that explains it.
- **A full checkpoint that cannot be a LoRA base.** No config, no tokenizer, or names of a wrapper. Here: an
  error that names what is missing and where to get it; what Partwise saves is such a base, in a fresh
  process.

The models are tiny random ones of Gemma-3, LLaVA, Qwen2.5-VL and Llama, so a number tells that something
happens, not how much it costs a real model. Numbers and quoted messages are from the run that wrote this
page with {versions}:
`python tests/others/write_comparison.py > docs/comparison.md`.
"""

COLUMNS = "| situation | plain | Partwise |\n|---|---|---|\n"


def run_case(case: Case, bench: Bench) -> Row:
    """What the case observes, whatever ran before it. Torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case(bench)


def page(observe: Callable[[Case], Row]) -> str:
    """docs/comparison.md; `observe` runs a case, or knows already what it gave."""
    names = ("transformers", "peft", "torch", "accelerate")
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)
    text = HEAD.format(versions=versions)
    for title, cases in SECTIONS.items():
        text += f"\n## {title}\n\n{COLUMNS}" + "".join(line(observe(case)) for case in cases)
    return text


def line(row: Row) -> str:
    said = f"<br>`{row.message}`" if row.message else ""
    return table_line(row.situation, row.plain, row.partwise + said)


def short_table(observe: Callable[[Case], Row]) -> str:
    """The most striking rows, each cell cut to its first sentence."""
    rows = [observe(case) for case in SHORT]
    cells = [map(first_sentence, (row.situation, row.plain, row.partwise)) for row in rows]
    return COLUMNS + "".join(table_line(*cell) for cell in cells)


def first_sentence(text: str) -> str:
    return text.partition(". ")[0].removesuffix(".")


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> None:
    torch.set_num_threads(1)
    write = short_table if "--short" in sys.argv[1:] else page
    # Libraries greet on stdout when they are imported; the page alone goes there.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        bench = Bench(Path(folder))
        text = write(lambda case: run_case(case, bench))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
