"""What is loaded: folders that hold another model than it seems, or only a part of one."""

from __future__ import annotations

import json
import shutil

import torch
from bench import Bench, Row, failure, listening, loss_of, update
from cases_folders import edited_copy, open_ours, open_plain
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, Gemma3ForCausalLM

from partwise.config import ModelConfig
from partwise.model.load import load_model
from partwise.run import check

ADAPTERS = LoraConfig(target_modules=r".*language_model.*\.q_proj")


def head_that_is_not_there(bench: Bench) -> Row:
    folder = edited_copy(bench, "untied", lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model, missing, said = open_plain(folder)
    assert missing == ["lm_head.weight"] and "MISSING" in said
    assert not torch.equal(model.lm_head.weight, bench.load().lm_head.weight)
    message = bench.refusal(open_ours, folder)
    assert "set tie_word_embeddings: true there" in message
    return Row(
        "`tie_word_embeddings` says false, and the file has no head.",
        "Loads with a random head. A table in the log says so.",
        "Stops, and names the key.",
        message,
    )


def multimodal_model_as_text_model(bench: Bench) -> Row:
    with listening() as said:
        model, report = Gemma3ForCausalLM.from_pretrained(bench.base(), output_loading_info=True)
    total = len(list(model.parameters()))
    missing = set(report["missing_keys"]) - {"lm_head.weight"}
    assert len(missing) == total and "MISSING" in " ".join(said)
    embeddings = model.get_input_embeddings().weight
    assert not torch.equal(embeddings, bench.load().get_input_embeddings().weight)
    ours = load_model(ModelConfig(path=str(bench.base()), dtype="float32")).model
    same = [torch.equal(p, ours.get_parameter(n)) for n, p in bench.load().named_parameters()]
    assert all(same) and type(ours).__name__ == "Gemma3ForConditionalGeneration"
    return Row(
        "Only the text of a Gemma-3 with images is wanted: `Gemma3ForCausalLM.from_pretrained(folder)`.",
        f"Loads, and all {total} tensors are random. A table in the log says so.",
        f"The class is that of `config.json`, and all {len(same)} tensors are those of the file. A text run "
        "freezes the vision tower, or gives rows without images.",
    )


def adapters_that_were_not_merged(bench: Bench) -> Row:
    folder = edited_copy(bench, "unmerged", lambda tensors: tensors)
    get_peft_model(bench.load(), ADAPTERS).base_model.model.save_pretrained(folder)
    _, missing, said = open_plain(folder)
    assert missing and all("q_proj.weight" in name for name in missing) and "MISSING" in said
    message = bench.refusal(open_ours, folder)
    assert "adapter tensors that were not merged" in message
    return Row(
        "A model was saved with its adapters in it, not merged.",
        f"Loads, and the {len(missing)} layers under the adapters are random. A table in the log says so.",
        "Stops, and says what to do with the model.",
        message,
    )


def adapter_as_base(bench: Bench) -> Row:
    """A full fine-tune that starts from an adapter folder, saved and loaded again."""
    adapter, saved, inputs = bench.folder / "lora", bench.folder / "full-on-lora", bench.inputs()
    get_peft_model(bench.load(), ADAPTERS).save_pretrained(adapter)
    with listening() as said:
        model = AutoModelForImageTextToText.from_pretrained(adapter).requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            update(model, optimizer, inputs)
        trained = loss_of(model, inputs)
        model.save_pretrained(saved)
        again = loss_of(AutoModelForImageTextToText.from_pretrained(saved), inputs)
    assert not (saved / "model.safetensors").exists() and again - trained > 0.5 and not said
    message = bench.refusal(open_ours, adapter)
    assert "holds an adapter (adapter_config.json), not a whole model" in message
    return Row(
        "A full fine-tune starts from the folder of an adapter.",
        f"Loads base and adapter, trains all weights, and saves the adapter alone: the loss is {trained:.2f} "
        f"before saving and {again:.2f} after loading. Nothing is said.",
        "Stops, and names the base.",
        message,
    )


def tokens_without_a_row(bench: Bench) -> Row:
    folder = edited_copy(bench, "more-tokens", lambda tensors: tensors)
    processor = bench.processor()
    processor.tokenizer.add_tokens([f"[place_{i}]" for i in range(20)])
    processor.save_pretrained(folder)
    model, _, said = open_plain(folder)
    ids = processor.tokenizer("at [place_19]", return_tensors="pt")["input_ids"]
    stopped = failure(model, input_ids=ids)
    assert stopped == "IndexError: index out of range in self" and not said
    config = bench.config("parts: {language_model: full}")
    settings = config.model.model_copy(update={"path": str(folder)})
    (finding,) = check(config.model_copy(update={"model": settings}), only=["model"])
    message = finding.message.replace(f"{bench.folder}/", "")
    assert finding.level == "error" and "7 of the tokenizer's 519 tokens lie beyond the 512 rows" in message
    return Row(
        "Tokens were added to the tokenizer, and the model's embeddings were not resized.",
        f"Loads. The first row that holds one of the last ends the run: `{stopped}`.",
        "Stops before the weights are read, and names the tokens.",
        message,
    )


def file_cut_off(bench: Bench) -> Row:
    folder = bench.folder / "cut"
    shutil.copytree(bench.base(), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    plain = failure(AutoModelForImageTextToText.from_pretrained, folder)
    assert plain.startswith("SafetensorError: ") and "model.safetensors" not in plain
    message = bench.refusal(open_ours, folder)
    assert "cut/model.safetensors (" in message and "copy or download it again" in message
    return Row(
        "A weights file is cut off, by a full disk or a broken download.",
        f"An error that names no file: `{plain}`.",
        "Stops, with the file and its size. `partwise check` looks before anything is loaded.",
        message,
    )


CASES = (
    head_that_is_not_there,
    multimodal_model_as_text_model,
    adapters_that_were_not_merged,
    adapter_as_base,
    tokens_without_a_row,
    file_cut_off,
)
