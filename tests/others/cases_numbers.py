"""What a step computes: the loss under accumulation, and updates of bfloat16 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Row, listening
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PrinterCallback, Trainer, TrainingArguments

from partwise.data.chat import truncate
from partwise.data.collate import collate
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import IGNORE_INDEX, Dropped, Example, StepData
from partwise.training.optim import Optimizer
from partwise.training.step import batch_loss_sum, read_outcomes, train_step

CPU = torch.device("cpu")
# Tokens of each row, and how many of them are its answer.
LENGTHS = ((12, 1), (14, 2), (20, 3), (40, 30))
STEPS = 20


def make_examples() -> list[Example]:
    """Text rows with answers of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row, (num_tokens, num_targets) in enumerate(LENGTHS):
        ids = torch.randint(10, 400, (num_tokens,), generator=generator)
        labels = ids.clone()
        labels[:-num_targets] = IGNORE_INDEX
        examples.append(Example(ids, labels, {}, {}, num_targets, "train.jsonl", row))
    return examples


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        name: pad_sequence([r[name] for r in rows], True, IGNORE_INDEX if name == "labels" else 0)
        for name in rows[0]
    }


def run_trainer(
    model: Any,
    examples: list[Example],
    folder: Path,
    batch_size: int,
    num_steps: int,
    resume: bool = False,
    **settings: Any,
) -> Trainer:
    """transformers' Trainer after so many steps over all of the examples' rows, or one row each."""
    rows = [
        {"input_ids": e.input_ids, "labels": e.labels, "attention_mask": torch.ones_like(e.input_ids)}
        for e in examples
    ]
    arguments = TrainingArguments(
        folder,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // (batch_size * num_steps),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"save_strategy": "no", **settings},
    )
    trainer = Trainer(model, arguments, data_collator=pad, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_update(bench: Bench, family: str, batch_size: int) -> tuple[torch.Tensor, float]:
    """What one step of plain SGD at rate 1 adds to the weights, and the loss that is reported."""
    model = bench.load(family)
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    trainer = run_trainer(model, make_examples(), bench.folder / "trainer", batch_size, 1, **settings)
    changes = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    return torch.cat(changes), losses_of(trainer)[0]


def our_update(bench: Bench, family: str, batch_size: int) -> tuple[torch.Tensor, float, float]:
    """What one step adds to the language model's weights, its loss, and the norm of its gradient."""
    model, examples = bench.load(family), make_examples()
    config = bench.config("parts: {language_model: full}", family, "train: {learning_rate: 1.0e-3}")
    plan = resolve_plan(model, config)
    apply_plan(model, plan)
    before = {name: model.get_parameter(name).detach().clone() for name in plan.trainable}
    groups = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
    step_data = StepData(0, tuple(collate(group, pad_token_id=0) for group in groups))
    outcome = train_step(model, step_data, Optimizer(model, plan, config.train, 1), CPU)
    changes = [(model.get_parameter(name).detach() - b).flatten() for name, b in before.items()]
    (values,) = read_outcomes([outcome])
    return torch.cat(changes), values.loss, values.grad_norm


def classes_averaged_per_batch() -> dict[str, bool]:
    """For each image-text-to-text model type, whether its class declines Trainer's count of target tokens."""
    classes = {
        config.model_type: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config]
        for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    }
    return {name: getattr(cls, "accepts_loss_kwargs", None) is False for name, cls in classes.items()}


def accumulation(bench: Bench) -> Row:
    family = "qwen2.5-vl"
    with listening() as said:
        whole, whole_loss = trainer_update(bench, family, len(LENGTHS))
        split, split_loss = trainer_update(bench, family, 1)
        others = [trainer_update(bench, "gemma3", size)[0] for size in (len(LENGTHS), 1)]
    cosine = cosine_similarity(whole, split, dim=0).item()
    ratio = (split.norm() / whole.norm()).item()
    assert cosine < 0.8 and ratio > 1.5
    assert not any("accumulation" in text for text in said)
    torch.testing.assert_close(others[0], others[1], rtol=1e-3, atol=1e-5)
    averaged = classes_averaged_per_batch()
    assert averaged[bench.load(family).config.model_type] and not averaged["gemma3"]
    ours, ours_split = (our_update(bench, family, size) for size in (len(LENGTHS), 1))
    assert ours_split[1:] == pytest.approx(ours[1:], rel=1e-5)
    # Both give the same where nothing is accumulated. SGD at rate 1 subtracts the gradient.
    assert ours[1:] == pytest.approx((whole_loss, whole.norm().item()), rel=1e-3)
    ours_cosine = cosine_similarity(ours[0], ours_split[0], dim=0).item()
    assert ours_cosine > 0.999
    return Row(
        "Qwen2.5-VL: the same four rows as one batch of 4, or as 4 batches of 1 accumulated.",
        f"Trainer makes another update: {ratio:.1f} times as long, at cosine {cosine:.2f} to that of the "
        f"whole batch. It takes the mean of the batches' means, and reports the loss {split_loss:.2f}, not "
        f"{whole_loss:.2f}. {sum(averaged.values())} of transformers' {len(averaged)} image-text-to-text "
        "model types ask for that (`accepts_loss_kwargs = False`); Gemma-3 does not, and is exact.",
        f"The same update, at cosine {ours_cosine:.2f}. The loss is the mean over all target tokens of the "
        f"step, {ours_split[1]:.2f}, for every model and split.",
    )


def steps_without_labels(bench: Bench) -> Row:
    examples = make_examples()
    limit = int((examples[3].labels != IGNORE_INDEX).nonzero()[0])
    for row in (2, 3):
        examples[row] = truncate(examples[row], limit)
    num_empty = sum(example.num_target_tokens == 0 for example in examples)
    model = bench.load()
    with listening() as said:
        trainer = run_trainer(model, examples, bench.folder / "trainer", 1, len(examples))
    losses = losses_of(trainer)
    reported = sum(losses) / len(losses)
    real = [loss for loss in losses if loss != 0.0]
    assert num_empty == len(losses) - len(real) == 2
    assert not any("nan" in text.lower() or "label" in text.lower() for text in said)
    inputs = {"input_ids": examples[3].input_ids[None], "labels": examples[3].labels[None]}
    own = model(**inputs).loss
    assert own.isnan()
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]
    whole = bench.example({"messages": turns})
    assert isinstance(whole, Example)
    first = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    dropped = bench.example({"messages": turns}, max_seq_len=first)
    assert isinstance(dropped, Dropped) and dropped.reason == "no target token"
    return Row(
        f"The length limit cuts the whole answer of {num_empty} of {len(examples)} rows away.",
        f"Trainer reports a loss of {reported:.2f}, where the steps that have an answer give "
        f"{sum(real) / len(real):.2f}. A row without labels has the loss {own.item()}, which is logged as 0.",
        f'They are dropped as "{dropped.reason}", and counted. A loss that is not finite stops the run.',
    )


def bfloat16_updates(bench: Bench) -> Row:
    """The same steps with fp32 weights, plain bfloat16 weights, and bfloat16 weights with fp32 masters."""
    batch = collate(make_examples(), pad_token_id=0)
    exact, plain, ours = (bench.load("llama", "bfloat16") for _ in range(3))
    exact.float()
    config = bench.config(
        "parts: {language_model: full}",
        "llama",
        "train: {learning_rate: 1.0e-5, learning_rate_schedule: constant, max_grad_norm: 1.0e+9}",
    )
    plan = resolve_plan(ours, config)
    apply_plan(ours, plan)
    names = [n for n, p in exact.named_parameters() if ".layers." in n and p.ndim == 2]
    before = {n: exact.get_parameter(n).detach().clone() for n in names}
    spread = torch.cat([tensor.flatten() for tensor in before.values()]).std().item()
    optimizer = Optimizer(ours, plan, config.train, STEPS)
    adamws = {m: torch.optim.AdamW(m.parameters(), lr=1e-5, weight_decay=0) for m in (exact, plain)}
    for step in range(STEPS):
        for model, adamw in adamws.items():
            (batch_loss_sum(model, batch, CPU) / batch.num_target_tokens).backward()
            adamw.step()
            adamw.zero_grad()
        train_step(ours, StepData(step, (batch,)), optimizer, CPU)

    def moved(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(tensors[n].detach().float() - before[n]).flatten() for n in names])

    wanted, without = moved(dict(exact.named_parameters())), moved(dict(plain.named_parameters()))
    with_masters = moved(optimizer.masters)
    unmoved, unmoved_masters = (100 * (m == 0).float().mean().item() for m in (without, with_masters))
    cosines = [cosine_similarity(m, wanted, dim=0).item() for m in (without, with_masters)]
    assert unmoved > 50 and unmoved_masters < 1 and cosines[0] < 0.7 and cosines[1] > 0.95
    return Row(
        f"bfloat16 weights of spread {spread:.2f}, AdamW at 1e-5, {STEPS} steps.",
        f"{unmoved:.1f} % of the weights stand where they began: the updates are rounded away. What is left "
        f"of them has cosine {cosines[0]:.2f} to what fp32 weights do.",
        f"{unmoved_masters:.1f} %: updates are kept in fp32 masters, and reach a weight when they are large "
        f"enough for bfloat16. The masters' cosine to what fp32 weights do is {cosines[1]:.2f}.",
    )


CASES = (accumulation, steps_without_labels, bfloat16_updates)
