"""What trains: frozen parts, adapters, layer ranges, and gradients that nobody asked for."""

from __future__ import annotations

import torch
from bench import Bench, Row, failure, listening, trained_names, update
from peft import LoraConfig, get_peft_model

from partwise.model.load import empty_model
from partwise.model.memory import enable_gradient_checkpointing
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import PartsPlan

ALL_FROZEN = """\
finetuning_type: full
freeze_vision_tower: true
freeze_multi_modal_projector: true
freeze_language_model: true
"""


def plan_of(bench: Bench, parts: str, family: str = "gemma3") -> PartsPlan:
    return resolve_plan(empty_model(bench.base(family)), bench.config(parts, family))


def everything_frozen(bench: Bench) -> Row:
    model = bench.load().requires_grad_(False)
    trainable = (p for p in model.parameters() if p.requires_grad)
    no_optimizer = failure(torch.optim.AdamW, list(trainable))
    optimizer = torch.optim.AdamW(model.parameters())
    no_backward = failure(update, model, optimizer, bench.inputs())
    assert no_optimizer == "ValueError: optimizer got an empty parameter list"
    assert no_backward.startswith("RuntimeError: element 0 of tensors does not require grad")
    message = bench.refusal(bench.config, ALL_FROZEN)
    assert "nothing would train" in message and "config.yaml:5-7" in message
    return Row(
        "Every part is frozen.",
        f"Stops with an error that names no part. With the open parameters alone: `{no_optimizer}`. With all "
        f"of them in the optimizer, after the weights are loaded: `{no_backward}`.",
        "Stops before weights are read, and names the lines.",
        message,
    )


def everything_frozen_with_checkpointing(bench: Bench) -> Row:
    model = bench.load().requires_grad_(False).train()
    model.activation_checkpointing_enable()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with listening() as said:
        losses = [update(model, optimizer, bench.inputs()) for _ in range(3)]
    changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
    assert not changed and len(set(losses)) == 1 and not said
    message = bench.refusal(bench.config, ALL_FROZEN, train="train: {gradient_checkpointing: true}")
    assert "nothing would train" in message
    return Row(
        "Every part is frozen, gradient checkpointing is on.",
        f"Trains in silence: {len(losses)} steps with the loss {losses[0]:.2f}, and {len(changed)} of "
        f"{len(before)} tensors change. Checkpointing makes the embeddings' output require a gradient, so "
        "that nothing raises.",
        "Stops before weights are read: nothing would train.",
    )


def lora_by_suffix(bench: Bench) -> Row:
    with listening() as said:
        model = get_peft_model(bench.load(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    targets = [name for name in trained_names(model) if "lora_A" in name]
    in_tower = [name for name in targets if "vision_tower" in name]
    assert in_tower and len(in_tower) < len(targets) and not said
    plan = plan_of(bench, "parts: {language_model: {mode: lora, lora_targets: attention}}")
    planned = plan["language_model"].lora_targets
    assert planned and all(target.startswith("model.language_model.") for target in planned)
    assert not plan["vision_tower"].trainable
    return Row(
        "LoRA on `q_proj` and `v_proj`, meant for the language model.",
        f"{len(in_tower)} of {len(targets)} adapters stand in the vision tower, whose layers have the same "
        "names.",
        f"All {len(planned)} adapters stand in the language model. Targets are full names of its layers.",
    )


def lora_target_with_a_typo(bench: Bench) -> Row:
    with listening() as said:
        model = get_peft_model(bench.load(), LoraConfig(target_modules=["q_proj", "gate_porj"]))
    wrapped = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_names(model)}
    assert wrapped == {"q_proj"} and not said
    message = bench.refusal(bench.config, "parts: {language_model: {mode: lora, lora_targets: atention}}")
    assert 'Did you mean "attention"?' in message
    return Row(
        "A LoRA target is misspelt: `gate_porj` beside `q_proj`.",
        "Trains without it. `q_proj` gets its adapters, and nothing is said about the other name.",
        "Stops. Targets are a choice of three words, and other words are errors.",
        message,
    )


def layers_that_do_not_exist(bench: Bench) -> Row:
    settings = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 6])
    with listening() as said:
        names = [name for name in trained_names(get_peft_model(bench.load(), settings)) if "lora_A" in name]
    in_tower = [name for name in names if "vision_tower" in name]
    assert len(names) == 2 and all(".layers.1." in name for name in names) and not said
    assert len(in_tower) == 1
    parts = 'parts: {language_model: {mode: lora, layers: "1:6"}}'
    message = bench.refusal(plan_of, bench, parts)
    assert "has 2 layers" in message
    return Row(
        "LoRA on layers 1 and 6 of a language model that has two.",
        "Trains layer 1 and says nothing of layer 6. Layer 1 of the vision tower gets an adapter, too.",
        "Stops. A range is of one part, and lies inside its layers.",
        message,
    )


def projector_opened_before_lora(bench: Bench) -> Row:
    model = bench.load()
    model.model.multi_modal_projector.requires_grad_(True)
    with listening() as said:
        model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    opened = [name for name in trained_names(model) if "multi_modal_projector" in name]
    assert not opened and not said
    plan = plan_of(bench, "parts: {projector: full, language_model: lora}")
    trained = bench.load()
    apply_plan(trained, plan)
    real = [name for name in trained_names(trained) if "multi_modal_projector" in name]
    assert set(real) == set(plan["projector"].trainable) and len(real) == 2
    return Row(
        "The projector is opened, then the language model gets LoRA.",
        f"The projector is closed again in silence: {len(opened)} of its {len(real)} tensors train.",
        f"{len(real)} of {len(real)} train. After the plan is applied, what trains is compared with the plan "
        "by name.",
    )


def count_tower_backwards(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many linear layers and norms of the vision tower run in the backward pass, and how many it has."""
    tower = model.get_submodule("model.vision_tower")
    modules = [m for m in tower.modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]
    reached: list[torch.nn.Module] = []
    handles = [m.register_full_backward_hook(lambda module, *_: reached.append(module)) for m in modules]
    model(**inputs, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return len(set(reached)), len(modules)


def backward_through_a_frozen_tower(bench: Bench) -> Row:
    model = bench.load().train()
    model.model.vision_tower.requires_grad_(False)
    without, num_modules = count_tower_backwards(model, bench.inputs())
    model.activation_checkpointing_enable()
    with listening() as said:
        reached, _ = count_tower_backwards(model, bench.inputs())
    assert without == 0 and reached == num_modules > 0 and not said
    ours = bench.load()
    config = bench.config("parts: {projector: full, language_model: full}")
    plan = resolve_plan(ours, config)
    apply_plan(ours, plan)
    enable_gradient_checkpointing(ours, plan)
    ours_reached, _ = count_tower_backwards(ours, bench.inputs())
    assert ours_reached == 0
    return Row(
        "The vision tower is frozen, gradient checkpointing is on.",
        f"The backward pass runs through the frozen tower: {reached} of its {num_modules} linear layers and "
        f"norms, {without} without checkpointing. It costs memory and time and changes no gradient that is "
        "used.",
        f"{ours_reached} of {num_modules}. Only parts that a gradient passes are recomputed.",
    )


def tensors_without_gradient(bench: Bench) -> Row:
    model = bench.load("llava").requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    with listening() as said:
        model(**bench.inputs("llava")).loss.backward()
    names = trained_names(model)
    dead = {name for name in names if model.get_parameter(name).grad is None}
    assert dead and len(dead) < len(names) and not said
    tower = plan_of(bench, "parts: {vision_tower: full}", "llava")["vision_tower"]
    assert set(tower.held) == dead and set(tower.trainable) == set(names) - dead
    reason = next(iter(tower.held.values()))
    return Row(
        "LLaVA's vision tower trains in full.",
        f"{len(dead)} of its {len(names)} tensors never get a gradient, and are counted as trainable.",
        f"These {len(dead)} are held and the plan says why: {reason}. A tensor of the plan that gets no "
        "gradient from the first batch stops the run.",
    )


CASES = (
    everything_frozen,
    everything_frozen_with_checkpointing,
    lora_by_suffix,
    lora_target_with_a_typo,
    layers_that_do_not_exist,
    projector_opened_before_lora,
    backward_through_a_frozen_tower,
    tensors_without_gradient,
)
