"""What trains, seen by its gradients: rates that nothing uses, checkpointing, batches without images."""

from __future__ import annotations

import json
from typing import Any

import torch
from bench import Bench, Row, failure, listening, trained_names, update
from cases_folders import edited_copy
from cases_parts import plan_of
from cases_rows import row_of
from peft import LoraConfig, get_peft_model

from partwise.data.collate import collate
from partwise.model.load import load_model
from partwise.model.memory import enable_gradient_checkpointing
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import PartsPlan, StepData
from partwise.run import check
from partwise.training.optim import Optimizer
from partwise.training.step import train_step

Tensors = dict[str, torch.Tensor]


def opened_by(bench: Bench, parts: str, checkpointing: bool = False) -> tuple[Any, PartsPlan]:
    """A model with this plan applied."""
    model = bench.load()
    plan = resolve_plan(model, bench.config(parts))
    apply_plan(model, plan)
    if checkpointing:
        enable_gradient_checkpointing(model, plan)
    return model, plan


def rate_for_a_frozen_part(bench: Bench) -> Row:
    model = bench.load()
    tower, decoder = model.model.vision_tower, model.model.language_model
    tower.requires_grad_(False)
    groups = [{"params": tower.parameters(), "lr": 1e-4}, {"params": decoder.parameters(), "lr": 1e-3}]
    before = [p.clone() for p in tower.parameters()]
    with listening() as said:
        optimizer = torch.optim.AdamW(groups)
        for _ in range(3):
            update(model, optimizer, bench.inputs())
    moved = sum(not torch.equal(p, b) for p, b in zip(tower.parameters(), before, strict=True))
    assert moved == 0 and not said and optimizer.param_groups[0]["lr"] == 1e-4
    parts = "parts:\n  vision_tower: {mode: frozen, learning_rate: 1.0e-4}\n  language_model: full"
    message = bench.refusal(bench.config, parts)
    assert "has no effect: vision_tower is frozen" in message
    return Row(
        "A learning rate is given for the vision tower, which is frozen.",
        f"The optimizer takes the group and its rate, and trains the rest: {moved} of the tower's "
        f"{len(before)} tensors move. Nothing is said.",
        "Stops. A setting without effect is an error.",
        message,
    )


def gradients_of(model: Any, inputs: Tensors) -> dict[str, torch.Tensor | None]:
    """Gradient of each tensor that trains, after one backward pass."""
    model(**inputs, use_cache=False).loss.backward()
    return {name: model.get_parameter(name).grad for name in trained_names(model)}


def norm_of(gradients: dict[str, torch.Tensor | None]) -> float:
    return torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None]).item()


def reentrant_checkpointing(bench: Bench) -> Row:
    """The hooks that transformers installs for it are off, as where checkpointing is set up by hand."""
    ids = torch.arange(10, 40)[None]
    inputs, layers = {"input_ids": ids, "labels": ids}, "model.language_model.layers"

    def plain(reentrant: bool) -> tuple[dict[str, torch.Tensor | None], str]:
        model = bench.load().requires_grad_(False).train()
        model.model.language_model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model.disable_input_require_grads()
        with listening() as said:
            gradients = gradients_of(model, inputs)
        return gradients, " ".join(said)

    (right, _), (wrong, said) = plain(False), plain(True)
    lost = [name for name, gradient in wrong.items() if gradient is None]
    assert all(gradient is not None for gradient in right.values()) and len(lost) == len(wrong) - 1
    assert "None of the inputs have requires_grad=True" in said
    model, plan = opened_by(bench, 'parts: {language_model: {mode: full, layers: "0:"}}', True)
    ours = gradients_of(model, inputs)
    assert set(ours) == set(plan.trainable) and all(name.startswith(layers) for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, right[name])
    return Row(
        "The embeddings are frozen, and checkpointing is reentrant, set up by hand.",
        f"{len(lost)} of the language model's {len(wrong)} open tensors get no gradient. There is a loss, a "
        f"gradient norm of {norm_of(wrong):.2g}, where it should be {norm_of(right):.2g}, and one warning of "
        "torch; the run goes on.",
        f"Every gradient is the one without checkpointing, in all {len(ours)} tensors of the layers. "
        "Checkpointing is never reentrant; a tensor that gets no gradient is an error before the run.",
    )


def text_batch_for_the_vision_side(bench: Bench) -> Row:
    model = bench.load().requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    first = update(model, optimizer, bench.inputs())
    stopped = failure(update, model, optimizer, bench.inputs(colors=()))
    assert first > 0 and stopped.startswith("RuntimeError: element 0 of tensors does not require grad")
    text, image = row_of(0), row_of(1, "red")
    mine, plan = opened_by(bench, "parts: {vision_tower: full}")
    config = bench.config("parts: {vision_tower: full}", train="train: {learning_rate: 1.0e-3}")
    batches = tuple(collate([example], 0) for example in map(bench.example, (text, image)))
    before = {name: mine.get_parameter(name).clone() for name in plan.trainable}
    train_step(mine, StepData(0, batches), Optimizer(mine, plan, config.train, 1), torch.device("cpu"))
    moved = [name for name, old in before.items() if not torch.equal(mine.get_parameter(name), old)]
    assert len(moved) == len(before)
    message = text_only_finding(bench, text)
    return Row(
        "Only the vision side trains, and a batch holds text alone.",
        f"The run ends there, be it after hours: `{stopped}`.",
        f"Such a batch counts in the loss and has no gradient; the step's images move all {len(moved)} "
        "tensors. Where no row at all has an image, the run does not start.",
        message,
    )


def text_only_finding(bench: Bench, row: dict[str, Any]) -> str:
    """What check says of a run whose rows are all this one."""
    data = bench.folder / "text.jsonl"
    data.write_text(4 * (json.dumps(row) + "\n"))
    config = bench.config(
        "parts: {vision_tower: full}", train="train: {steps: 2, global_batch_size: 2, micro_batch_size: 2}"
    )
    files = config.data.model_copy(update={"train": str(data), "num_workers": 0})
    findings = check(config.model_copy(update={"data": files}))
    (message,) = [finding.message for finding in findings if finding.level == "error"]
    assert "no gradient can reach it" in message
    return message


def lora_on_the_projector(bench: Bench) -> Row:
    with listening() as said:
        model = get_peft_model(bench.load(), LoraConfig(target_modules="all-linear"))
    names = [name for name in trained_names(model) if "lora_A" in name]
    assert names and not any("projector" in name for name in names) and not said
    named = failure(get_peft_model, bench.load(), LoraConfig(target_modules=["multi_modal_projector"]))
    assert named.startswith("ValueError: Target module Gemma3MultiModalProjector(")
    message = bench.refusal(plan_of, bench, "parts: {projector: lora, language_model: lora}")
    assert "Set parts.projector.mode: full" in message
    plan = plan_of(bench, "parts: {projector: full, language_model: lora}")
    assert len(plan["projector"].trainable) == 2
    return Row(
        "LoRA on Gemma-3's projector, which is a bare parameter.",
        f"`all-linear` gives {len(names)} adapters, none of them there, and says nothing. Named, it is "
        "`ValueError: Target module Gemma3MultiModalProjector(...) is not supported`.",
        "Stops, and says which mode trains it. In full beside adapters it is part of the adapter folder.",
        message,
    )


def tied_embeddings_beside_adapters(bench: Bench) -> Row:
    settings = LoraConfig(target_modules=r".*language_model.*\.q_proj", modules_to_save=["embed_tokens"])
    inputs = bench.inputs()
    with listening() as said:
        model = get_peft_model(bench.load(), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        update(model, optimizer, inputs)
    merged = model.merge_and_unload()
    assert any("ensure_weight_tying" in text for text in said)
    tables = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    apart = int((tables[0] != tables[1]).any(dim=1).sum())
    flags = merged.config.tie_word_embeddings, merged.config.text_config.tie_word_embeddings
    assert apart > 0 and flags == (False, True)
    message = warned_of(bench, merged)
    mine, plan = opened_by(bench, "parts: {language_model: full}")
    config = bench.config("parts: {language_model: full}")
    step = StepData(0, (collate([bench.example(row_of(1, "red"))], 0),))
    train_step(mine, step, Optimizer(mine, plan, config.train, 1), torch.device("cpu"))
    assert mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
    assert not torch.equal(mine.get_input_embeddings().weight, tables[1])
    return Row(
        "`modules_to_save=['embed_tokens']`, and the model's head is tied to its embeddings.",
        f"One warning, and the two come apart: {apart} of {len(tables[0])} rows differ after 3 steps. The "
        "merged config says both: `tie_word_embeddings` is false at the top and true in `text_config`.",
        "Beside adapters the embeddings stay frozen. A language model in full trains them as one tensor, "
        "tied before and after. Of a folder that says both, `partwise check` warns.",
        message,
    )


def warned_of(bench: Bench, model: Any) -> str:
    """The warning of check about this model, saved with everything that a folder needs."""
    folder = edited_copy(bench, "said-twice", lambda tensors: tensors)
    model.save_pretrained(folder)
    config = bench.config("parts: {language_model: full}")
    settings = config.model.model_copy(update={"path": str(folder)})
    findings = check(config.model_copy(update={"model": settings}), only=["model"])
    (message,) = [finding.message for finding in findings if finding.level == "warning"]
    assert "tie_word_embeddings is false, and true in text_config" in message
    loaded = load_model(settings).model
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    return message.replace(f"{bench.folder}/", "")


CASES = (
    rate_for_a_frozen_part,
    reentrant_checkpointing,
    text_batch_for_the_vision_side,
    lora_on_the_projector,
    tied_embeddings_beside_adapters,
)
