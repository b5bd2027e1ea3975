"""Loading is strict: every fault of a folder is one CheckpointError with its cause and the way out."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from partwise.config import ModelConfig
from partwise.engine.receive import tensor_facts
from partwise.errors import CheckpointError, ConfigError
from partwise.model.load import empty_model, load_model, load_model_config, load_processor, load_skeleton
from partwise.tiny import FAMILIES

SAME_MODEL = "Copy both from the same model."


@pytest.fixture
def copy_of(tiny_folder, tmp_path):
    return lambda family: Path(shutil.copytree(tiny_folder(family), tmp_path / family))


def load(folder, **settings):
    return load_model(ModelConfig(path=str(folder), **{"dtype": "float32", **settings}))


def refusal(folder, **settings):
    with pytest.raises(CheckpointError) as caught:
        load(folder, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **values):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_weights_has_the_types_of_the_one_that_read_them(family, dtype, tiny_folder):
    """Rotary frequencies stay float32 beside bfloat16 weights; ranks that disagree cannot share them."""
    settings = ModelConfig(path=str(tiny_folder(family)), dtype=dtype)
    read, waiting = load_model(settings).model, load_skeleton(settings).model
    assert tensor_facts(waiting) == tensor_facts(read)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
@pytest.mark.parametrize("family", ["gemma3", "llama", "qwen2-vl"])
def test_wrapped_names_are_refused_with_the_prefix_to_drop(family, prefix, copy_of):
    folder = copy_of(family)
    change_weights(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    count = len(load_file(folder / "model.safetensors"))
    text = refusal(folder)
    assert f"{count} missing in the files, which would be random" in text
    assert f"{count} in the files without a place in the model ({prefix}" in text
    assert text.endswith(
        f"Every name in the files begins with '{prefix}': the model was saved while it was wrapped. Without "
        f"that prefix all {count} tensors fit: save the inner model, or rename them."
    )


def test_wrapped_and_incomplete_weights_are_not_promised_to_fit(copy_of):
    folder = copy_of("llama")
    change_weights(folder, lambda w: {f"module.{name}": w[name] for name in sorted(w)[1:]})
    text = refusal(folder)
    assert "tensors fit" not in text and text.endswith(SAME_MODEL)


def test_missing_projector(copy_of):
    folder = copy_of("gemma3")
    change_weights(folder, lambda w: {name: w[name] for name in w if "projector" not in name})
    assert refusal(folder) == (
        f"{folder}: the weights do not fit Gemma3ForConditionalGeneration: 2 missing in the files, which "
        "would be random (model.multi_modal_projector.mm_input_projection_weight, "
        "model.multi_modal_projector.mm_soft_emb_norm.weight). config.json and the weights belong to "
        "different models, or the weights are not whole. Copy both from the same model."
    )


def test_missing_layer_is_counted_and_its_first_names_given(copy_of):
    folder = copy_of("llava")
    layer = "language_model.model.layers.1."
    change_weights(folder, lambda w: {name: w[name] for name in w if layer not in name})
    text = refusal(folder)
    assert ": 9 missing in the files, which would be random (model.language_model.layers.1." in text
    assert " and 6 more)" in text


def test_tensor_without_a_place(copy_of):
    folder = copy_of("llama")
    change_weights(folder, lambda w: {**w, "model.extra.weight": torch.zeros(2)})
    assert ": 1 in the files without a place in the model (model.extra.weight)." in refusal(folder)


def test_another_shape(copy_of):
    folder = copy_of("llama")
    change_weights(folder, lambda w: {**w, "model.norm.weight": torch.ones(32)})
    assert ": 1 of another shape (model.norm.weight (32,) instead of (64,))." in refusal(folder)


def test_weights_of_another_model(copy_of, tiny_folder):
    folder = copy_of("gemma3")
    shutil.copy(tiny_folder("gemma3-text") / "model.safetensors", folder)
    text = refusal(folder)
    # 67, not 68: the tied head is no weight of its own.
    assert "67 missing in the files" in text and "28 in the files without a place" in text
    assert text.endswith(SAME_MODEL)


def test_adapter_tensors_that_were_not_merged(copy_of):
    folder = copy_of("llama")
    change_weights(
        folder, lambda w: {**w, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
    )
    assert refusal(folder).endswith(
        "The files hold adapter tensors that were not merged: merge the adapter and save the model again."
    )


def test_untied_head_without_weights(copy_of):
    folder = copy_of("llama")
    change_weights(folder, lambda w: {name: w[name] for name in w if name != "lm_head.weight"})
    text = refusal(folder)
    assert "1 missing in the files, which would be random (lm_head.weight)." in text
    assert "If the head shares the embeddings, set tie_word_embeddings: true there" in text


def test_tied_head_with_weights_of_its_own(copy_of):
    folder = copy_of("gemma3")
    embeddings = "language_model.model.embed_tokens.weight"
    change_weights(folder, lambda w: {**w, "language_model.lm_head.weight": w[embeddings].clone()})
    assert load(folder).model.lm_head.weight is not None
    change_weights(folder, lambda w: {**w, "language_model.lm_head.weight": w[embeddings] + 1})
    text = refusal(folder)
    assert "1 that the config ties to the embeddings but the files do not (lm_head.weight)." in text
    assert "set tie_word_embeddings: false in config.json" in text


def test_cut_off_and_broken_files(copy_of):
    file = copy_of("gemma3") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    text = refusal(file.parent)
    assert text.startswith(
        f"{file} ({len(whole) - 100} bytes) is not a whole safetensors file: SafetensorError: "
    )
    assert text.endswith("It is cut off or damaged; copy or download it again.")
    file.write_bytes(b"no")
    assert "is not a whole safetensors file" in refusal(file.parent)


def test_missing_weights_and_shards(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    assert refusal(folder).startswith(
        f"{folder} has no weights (neither model.safetensors, pytorch_model.bin"
    )
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder) == (
        f"{folder} lacks model-00001-of-00002.safetensors, one of the 2 files that its index lists. Copy or "
        "download it."
    )


def test_pickled_weights_load_only_as_tensors(copy_of, tiny_folder):
    folder = copy_of("llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    expected = load(tiny_folder("llama")).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).model.state_dict().items())
    torch.save({**weights, "extra": Path("x")}, folder / "pytorch_model.bin")
    assert "its pickled weights hold more than tensors, and loading that would run code." in refusal(folder)


def test_sharded_weights(copy_of, tiny_folder):
    folder = copy_of("gemma3")
    model = load(folder).model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    expected = load(tiny_folder("gemma3")).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": None}, "has no model_type, so the model's class is unknown."),
        ({"model_type": "gemma99"}, "has no model type 'gemma99'. Install a version that has it, or correct"),
        (
            {"model_type": "gemma99", "auto_map": {"AutoConfig": "configuration.Gemma99"}},
            "'gemma99' is defined by Python code in the model folder. Read that code, and if you trust it, "
            "set model.trust_remote_code: true, or give --trust-remote-code to a command without a config.",
        ),
        ({"hidden_size": "wide"}, "it makes no config: StrictDataclassFieldValidationError: "),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantised"),
        ({"model_type": "clip_vision_model"}, "generates no text from text or images"),
    ],
)
def test_config_faults(values, text, copy_of):
    folder = copy_of("llama")
    change_config(folder, **values)
    message = refusal(folder)
    assert message.startswith(str(folder)) and text in message


def test_a_tokenizer_with_code_of_its_own_asks_for_trust(copy_of):
    folder = copy_of("llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise RuntimeError('this code ran')")
    assert refusal(folder).startswith(
        f"{folder}: its tokenizer cannot be loaded: it needs Python code in the folder. Read that code, and "
    )


def test_config_file_missing_or_broken(copy_of):
    folder = copy_of("llama")
    (folder / "config.json").write_text("{")
    assert refusal(folder).startswith(f"{folder / 'config.json'} cannot be read as JSON: JSONDecodeError: ")
    (folder / "config.json").write_text("[]")
    assert "holds a list, not a JSON object" in refusal(folder)
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder} has no config.json, so it is not a model folder.")


def test_adapter_folder_is_no_model(copy_of):
    folder = copy_of("gemma3")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    assert refusal(folder) == (
        f"{folder} holds an adapter (adapter_config.json), not a whole model. To train it further, give its "
        "base model (models/base) as model.path and this folder as model.adapter; to start from both as one "
        "model, export it with --to hf and give that folder."
    )
    (folder / "config.json").unlink()
    assert type(load_processor(folder)).__name__ == "Gemma3Processor"


def test_tokenizer_and_processor_files(copy_of):
    folder = copy_of("gemma3")
    (folder / "processor_config.json").rename(folder / "away")
    assert refusal(folder) == (
        f"{folder} has no processor (neither processor_config.json nor preprocessor_config.json), but its "
        "model (gemma3) takes images. Copy the processor files from the model that this one was made from."
    )
    (folder / "processor_config.json").write_text("{}")
    assert f"{folder}: its processor cannot be loaded: OSError: " in refusal(folder)
    (folder / "away").rename(folder / "processor_config.json")
    (folder / "tokenizer.json").write_text("{}")
    assert "its processor cannot be loaded: KeyError: " in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert refusal(folder).startswith(f"{folder} has no tokenizer (none of tokenizer.json, ")


@pytest.mark.parametrize("path", ["runs/typo", "google/gemma-3-4b-it", "gemma"])
def test_names_that_are_no_folder_and_cannot_be_fetched(path):
    text = refusal(path)
    assert text.startswith(
        f"There is no model folder {path} (from {Path.cwd()}), and no hub model of that name"
    )
    assert text.endswith("Correct model.path, or download the model and give its folder.")


def test_hub_names_fetch_weights_only_to_load_them(tiny_folder, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, "model*.safetensors" in allow_patterns))
        return str(tiny_folder("llama"))

    monkeypatch.setattr("partwise.model.folder.snapshot_download", snapshot)
    assert load_model_config("meta/llama").model_type == "llama"
    loaded = load("meta/llama")
    assert (loaded.path, loaded.name) == (str(tiny_folder("llama")), "meta/llama")
    assert asked == [("meta/llama", False), ("meta/llama", True)]


def test_a_folder_has_one_name_from_everywhere(tiny_folder, monkeypatch):
    folder = tiny_folder("llama")
    for working, path in ((folder.parent, "llama"), (folder, "."), (folder, "../llama")):
        monkeypatch.chdir(working)
        assert load(path).name == str(folder.resolve())


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../a/b/c"])
def test_paths_are_not_looked_up_on_the_hub(path):
    assert refusal(path) == f"There is no model folder {path} (from {Path.cwd()}). Correct model.path."


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert refusal(tmp_path / "model.safetensors").startswith(f"{tmp_path / 'model.safetensors'} is a file;")


def test_chat_template_of_the_config(tiny_folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    for family in ("gemma3", "llama"):
        processor = load(tiny_folder(family), chat_template=str(template)).processor
        for part in (processor, getattr(processor, "tokenizer", processor)):
            assert part.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user"
    with pytest.raises(
        ConfigError, match=r"model.chat_template: .*gone.jinja cannot be read: FileNotFoundError"
    ):
        load(tiny_folder("llama"), chat_template=str(tmp_path / "gone.jinja"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_and_attention(dtype, attention, tiny_folder):
    loaded = load(tiny_folder("gemma3"), dtype=dtype, attention=attention)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    config = loaded.model.config
    assert {config._attn_implementation, config.text_config._attn_implementation} == {attention}
    assert config.vision_config._attn_implementation == attention
    assert not loaded.model.training
    assert loaded.path == str(tiny_folder("gemma3"))


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_model_has_the_same_modules_and_no_memory(family, tiny_folder):
    empty, full = empty_model(tiny_folder(family)), load(tiny_folder(family)).model
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert type(empty) is type(full)
    shapes = {name: p.shape for name, p in full.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes


def test_no_report_is_printed_for_what_is_raised(copy_of, caplog):
    folder = copy_of("llama")
    change_weights(folder, lambda w: {**w, "model.extra.weight": torch.zeros(2)})
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        refusal(folder)
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""
    assert not logging.getLogger("transformers.modeling_utils").filters


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_processor_without_torchvision_saves_what_it_loaded(family, tiny_folder, tmp_path, make_image):
    folder = tiny_folder(family)
    processor = load_processor(folder)
    for name, twin in (
        ("pickled", pickle.loads(pickle.dumps(processor))),
        ("copied", copy.deepcopy(processor)),
    ):
        twin.save_pretrained(tmp_path / name)
        for file in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / name / file).read_text() == (folder / file).read_text()
        arguments = {"text": "<|image_pad|>", "images": make_image(), "return_tensors": "pt"}
        assert torch.equal(twin(**arguments)["pixel_values"], processor(**arguments)["pixel_values"])
    saved = json.loads((tmp_path / "copied" / "processor_config.json").read_text())
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert saved["processor_class"] == type(processor).__name__


def test_processor_without_torchvision_from_the_older_layout(copy_of, tmp_path):
    """Before transformers 5, both image and video settings were in preprocessor_config.json."""
    folder = copy_of("qwen2-vl")
    new = json.loads((folder / "processor_config.json").read_text())
    old = {**new["image_processor"], "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    (folder / "processor_config.json").unlink()
    load_processor(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["image_processor"] == new["image_processor"]
    assert saved["video_processor"]["patch_size"] == new["image_processor"]["patch_size"]


def test_load_model_config_gives_the_class_of_the_family(tiny_folder):
    assert type(load_model_config(tiny_folder("gemma3"))).__name__ == "Gemma3Config"
