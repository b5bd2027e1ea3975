"""What a step computes: losses that are multiplied or hidden, and updates that nobody meant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bench import Bench, Row, listening, update
from cases_numbers import CPU, LENGTHS, losses_of, make_examples, our_update, run_trainer

from partwise.config import load_config
from partwise.data.collate import collate
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import StepData
from partwise.training.optim import Optimizer
from partwise.training.step import read_outcomes, train_step

FAMILY = "llama"


class Wrapper(torch.nn.Module):
    """A model behind a forward that takes any keyword and passes on those it knows."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def our_model(bench: Bench, train: str) -> tuple[Any, Optimizer]:
    """A language model that trains in full, and its optimizer for ten steps."""
    model = bench.load(FAMILY)
    config = bench.config("parts: {language_model: full}", FAMILY, f"train: {{{train}}}")
    plan = resolve_plan(model, config)
    apply_plan(model, plan)
    return model, Optimizer(model, plan, config.train, 10)


def loss_behind_a_wrapper(bench: Bench) -> Row:
    numbers = []
    with listening() as said:
        for size in (len(LENGTHS), 1):
            model = Wrapper(bench.load(FAMILY))
            trainer = run_trainer(model, make_examples(), bench.folder / "trainer", size, 1)
            numbers.append((losses_of(trainer)[0], trainer.state.log_history[0]["grad_norm"]))
    (whole, whole_norm), (split, split_norm) = numbers
    assert split > 3.5 * whole and split_norm > 3 * whole_norm and not said
    ours, ours_split = (our_update(bench, FAMILY, size) for size in (len(LENGTHS), 1))
    assert ours_split[1:] == pytest.approx(ours[1:], rel=1e-5)
    assert ours[1:] == pytest.approx((whole, whole_norm), rel=1e-3)
    return Row(
        "A wrapper with `**kwargs` passes on to the model what it knows; 4 batches of 1 are accumulated.",
        f"The loss is {split:.1f}, not {whole:.2f}, and the gradient {split_norm / whole_norm:.1f} times as "
        "long. Trainer sees `**kwargs`, hands over the count of target tokens and leaves out the division; "
        "the wrapper drops the count. A loss of 70 that falls to 10 is this.",
        f"{ours_split[1]:.2f}, as for the whole batch. The model is never asked for its loss.",
    )


def loss_that_is_not_a_number(bench: Bench) -> Row:
    """The third of four rows holds a token whose embedding was never set."""
    examples = make_examples()
    others = torch.cat([e.input_ids for e in (examples[0], examples[1], examples[3])])
    token = next(id for id in examples[2].input_ids.tolist() if id not in others)

    def damage(model: Any) -> Any:
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = math.nan
        return model

    model = damage(bench.load(FAMILY))
    with listening() as said:
        settings = {"learning_rate": 1e-4, "seed": 1}
        trainer = run_trainer(model, examples, bench.folder / "trainer", 1, 4, **settings)
    losses = losses_of(trainer)
    broken = sum(bool(p.isnan().any()) for p in model.parameters())
    total = len(list(model.parameters()))
    assert broken == total and all(map(math.isfinite, losses)) and 0.0 in losses
    assert not any("nan" in text.lower() for text in said)
    mine, optimizer = our_model(bench, "learning_rate: 1.0e-4")
    damage(mine)
    before = [p.detach().clone() for p in mine.parameters()]
    step = StepData(0, (collate([examples[2]], 0),))
    message = bench.refusal(read_outcomes, [train_step(mine, step, optimizer, CPU)])
    assert "the rows are train.jsonl:3" in message
    assert all(
        torch.equal(p.nan_to_num(), b.nan_to_num()) for p, b in zip(mine.parameters(), before, strict=True)
    )
    return Row(
        "One row's loss is not a number.",
        f"Trainer logs {', '.join(f'{loss:.2f}' for loss in losses)} and ends well; all {broken} tensors of "
        "the model hold NaN. `logging_nan_inf_filter` is on.",
        "Stops at the step, with the module where it began and the rows in a file. No weight has changed.",
        message.partition(". Nothing was saved")[0] + ".",
    )


def float16_weights(bench: Bench) -> Row:
    model = bench.load(FAMILY, "float16")
    ids = torch.arange(10, 40)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with listening() as said:
        losses = [update(model, optimizer, {"input_ids": ids, "labels": ids}) for _ in range(2)]
    share = sum(int(p.isnan().sum()) for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    assert math.isfinite(losses[0]) and math.isnan(losses[1]) and share > 0.99 and not said
    bench.config("parts: {language_model: full}", FAMILY)
    message = bench.refusal(load_config, bench.folder / "config.yaml", ["model.dtype=float16"])
    assert "not one of bfloat16, float32" in message
    return Row(
        "float16 weights, `torch.optim.AdamW` at 1e-4.",
        f"After one step {100 * share:.0f} % of the weights are NaN: its eps of 1e-8 is 0 in float16, and a "
        "gradient of 0 is divided by it. Nothing is said.",
        "Stops. bfloat16 has the range, and fp32 masters have the digits.",
        message,
    )


def decay_of_norms(bench: Bench) -> Row:
    batch = collate(make_examples(), 0)

    def plain(decay: float) -> Any:
        model = bench.load(FAMILY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        update(model, optimizer, {"input_ids": batch.input_ids, "labels": batch.labels})
        return model

    def ours(decay: float) -> Any:
        model, optimizer = our_model(bench, f"learning_rate: 1.0e-2, weight_decay: {decay}")
        train_step(model, StepData(0, (batch,)), optimizer, CPU)
        return model

    def decayed(make: Any) -> set[str]:
        with_it, without = make(0.5), make(0.0)
        return {n for n, p in with_it.named_parameters() if not torch.equal(p, without.get_parameter(n))}

    every, some = decayed(plain), decayed(ours)
    names = {name for name, _ in bench.load(FAMILY).named_parameters()}
    spared = {name for name in names if "norm" in name or "embed_tokens" in name}
    assert every == names and some == names - spared
    return Row(
        "`torch.optim.AdamW(model.parameters(), weight_decay=0.5)`.",
        f"All {len(every)} tensors decay, the norms and the embeddings among them: what scales the "
        "activations is pulled to 0.",
        f"{len(some)} decay; norms, biases and embeddings never do.",
    )


def first_step_of_the_warm_up(bench: Bench) -> Row:
    model, examples = bench.load(FAMILY), make_examples()
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"learning_rate": 1e-3, "warmup_steps": 10}
    with listening() as said:
        trainer = run_trainer(model, examples, bench.folder / "trainer", len(LENGTHS), 1, **settings)
    rate = trainer.state.log_history[0]["learning_rate"]
    moved = sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert moved == 0 and rate == 0 and not said
    mine, optimizer = our_model(bench, "learning_rate: 1.0e-3, warmup_steps: 5")
    train_step(mine, StepData(0, (collate(examples, 0),)), optimizer, CPU)
    ours = sum(not torch.equal(p, b) for p, b in zip(mine.parameters(), before, strict=True))
    assert ours == len(before)
    return Row(
        "The first step of a warm-up.",
        f"Its learning rate is {rate:g}: {moved} of {len(before)} tensors move, and the batch is lost.",
        f"The warm-up begins above 0; {ours} of {len(before)} move, which is checked after the first step.",
    )


CASES = (
    loss_behind_a_wrapper,
    loss_that_is_not_a_number,
    float16_weights,
    decay_of_norms,
    first_step_of_the_warm_up,
)
