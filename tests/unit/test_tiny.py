"""Each tiny family: a whole folder that transformers loads as its own, the same for the same seed."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from partwise.config import ModelConfig
from partwise.errors import ConfigError
from partwise.model.load import load_model, load_processor, media_token_ids
from partwise.tiny import FAMILIES, write_tiny

TEXT_ONLY = ("gemma3-text", "llama")
NEEDS_TORCHVISION = ("qwen2-vl", "qwen2.5-vl")

CLASSES = {
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Processor"),
    "gemma3-text": ("Gemma3ForCausalLM", None),
    "llava": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava-next": ("LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "llama": ("LlamaForCausalLM", None),
}

END_OF_TURN = {
    "gemma3": "<end_of_turn>",
    "gemma3-text": "<end_of_turn>",
    "llava": "</s>",
    "llava-next": "</s>",
    "qwen2-vl": "<|im_end|>",
    "qwen2.5-vl": "<|im_end|>",
    "llama": "<|eot_id|>",
}

RENDERED = {
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>Which digit is this?<end_of_turn>\n"
    "<start_of_turn>model\n7<end_of_turn>\n",
    "gemma3-text": "<bos><start_of_turn>user\nWhich digit is this?<end_of_turn>\n"
    "<start_of_turn>model\n7<end_of_turn>\n",
    "llava": "USER: <image>\nWhich digit is this? ASSISTANT: 7</s>",
    "llava-next": "[INST] <image>\nWhich digit is this? [/INST] 7</s>",
    "qwen2-vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>Which digit is this?<|im_end|>\n"
    "<|im_start|>assistant\n7<|im_end|>\n",
    "llama": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhich digit is this?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n7<|eot_id|>",
}
RENDERED["qwen2.5-vl"] = RENDERED["qwen2-vl"]

families = pytest.mark.parametrize("family", FAMILIES)


def question(family, image=None):
    parts = [{"type": "text", "text": "Which digit is this?"}]
    if family not in TEXT_ONLY:
        parts.insert(0, {"type": "image", "image": image})
    return {"role": "user", "content": parts}


def answer(text="7"):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def tokenizer_of(processor):
    return getattr(processor, "tokenizer", processor)


@families
def test_loads_as_plain_transformers_with_the_same_weights(family, tiny_folder):
    folder = tiny_folder(family)
    loaded = load_model(ModelConfig(path=str(folder), dtype="float32"))
    auto_class = AutoModelForCausalLM if family in TEXT_ONLY else AutoModelForImageTextToText
    plain = auto_class.from_pretrained(folder)

    model_class, processor_class = CLASSES[family]
    assert type(loaded.model).__name__ == type(plain).__name__ == model_class
    assert json.loads((folder / "config.json").read_text())["architectures"] == [model_class]
    ours, theirs = loaded.model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    if processor_class is None:
        assert type(loaded.processor) is type(AutoTokenizer.from_pretrained(folder))
    else:
        assert type(loaded.processor).__name__ == processor_class
        assert (
            AutoImageProcessor.from_pretrained(folder).to_dict() == loaded.processor.image_processor.to_dict()
        )
    if processor_class and family not in NEEDS_TORCHVISION:
        assert AutoProcessor.from_pretrained(folder).to_dict() == loaded.processor.to_dict()


@families
def test_forward_and_backward_on_a_real_chat(family, tiny_folder, make_image):
    loaded = load_model(ModelConfig(path=str(tiny_folder(family)), dtype="float32"))
    chats = [[question(family, make_image((64, 48)))], [question(family, make_image((40, 80), "blue"))]]
    batch = loaded.processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        **(
            {"return_tensors": "pt", "padding": True}
            if family in TEXT_ONLY
            else {"processor_kwargs": {"return_tensors": "pt", "padding": True}}
        ),
    )
    logits = loaded.model(**batch, use_cache=False).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(logits).all()
    assert batch["input_ids"].max() < logits.shape[-1]
    # Uniform enough to learn from: no token is favoured by the random weights.
    assert logits.softmax(-1).max() < 0.1

    logits.logsumexp(-1).mean().backward()
    grad_norm = torch.nn.utils.get_total_norm(p.grad for p in loaded.model.parameters() if p.grad is not None)
    assert 0 < grad_norm < 100
    if family not in TEXT_ONLY:
        tower = loaded.model.get_encoder("image")
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())
        changed = dict(batch, pixel_values=batch["pixel_values"] + 1)
        assert not torch.equal(logits, loaded.model(**changed, use_cache=False).logits)


@families
def test_the_turns_of_the_family(family, tiny_folder):
    processor = load_processor(tiny_folder(family))
    full = processor.apply_chat_template([question(family), answer()], tokenize=False)
    prompt = processor.apply_chat_template([question(family)], tokenize=False, add_generation_prompt=True)
    assert full == RENDERED[family]
    assert full.startswith(prompt) and "7" not in prompt

    tokenizer = tokenizer_of(processor)
    full_ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert full_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(full_ids[len(prompt_ids) :]).strip() == f"7{END_OF_TURN[family]}"


@families
def test_content_as_string_or_parts_renders_the_same(family, tiny_folder):
    tokenizer = tokenizer_of(load_processor(tiny_folder(family)))
    system = {"role": "system", "content": "Be short."}
    plain = [system, {"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes."}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert rendered == tokenizer.apply_chat_template(parts, tokenize=False)
    assert rendered.index("Be short.") < rendered.index("Hello!") < rendered.index("Yes.")


@pytest.mark.parametrize("family", ["gemma3", "llava", "llava-next"])
def test_roles_must_alternate(family, tiny_folder):
    tokenizer = tokenizer_of(load_processor(tiny_folder(family)))
    with pytest.raises(Exception, match="roles must alternate: user, assistant, user"):
        tokenizer.apply_chat_template([question("llama"), question("llama")], tokenize=False)


@families
def test_any_text_survives_the_tokenizer(family, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(family))
    texts = [
        "héllo ▁ 日本 \t\n\n  𝔘𝔫𝔦 \x00\x7f 12  don't  end  ",
        "👩‍👩‍👧 e\u0301 \u202e\ufeff ",
        "a",
        "  ",
        "\r\n",
    ]
    texts += ["".join(chr(code) for code in range(start, start + 64)) for start in (0, 0x80, 0x2500, 0x1F600)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) <= 512
    assert [len(tokenizer.tokenize(digit)) for digit in "0123456789"] == [1] * 10
    assert len(tokenizer.tokenize("1234")) == 4
    assert len(tokenizer.tokenize("Which digit is this?")) == 5


@families
def test_generation_stops_at_the_end_of_a_turn(family, tiny_folder):
    folder = tiny_folder(family)
    tokenizer = tokenizer_of(load_processor(folder))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids(END_OF_TURN[family]) in generation["eos_token_id"]
    assert tokenizer.unk_token_id not in generation["eos_token_id"]
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.pad_token != END_OF_TURN[family]


def test_gemma_structure(tiny_folder, make_image):
    loaded = load_model(ModelConfig(path=str(tiny_folder("gemma3")), dtype="float32"))
    model, processor = loaded.model, loaded.processor
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert set(model.config.text_config.layer_types) == {"sliding_attention", "full_attention"}
    batch = processor(text=["<start_of_image>?"], images=[[make_image()]], return_tensors="pt")
    soft = batch["input_ids"] == model.config.image_token_id
    assert soft.sum() == model.config.mm_tokens_per_image
    assert torch.equal(batch["token_type_ids"] == 1, soft)


def test_llama_has_its_own_head(tiny_folder):
    model = load_model(ModelConfig(path=str(tiny_folder("llama")), dtype="float32")).model
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_llava_next_makes_tiles(tiny_folder, make_image):
    loaded = load_model(ModelConfig(path=str(tiny_folder("llava-next")), dtype="float32"))
    assert loaded.model.model.image_newline.abs().max() > 0
    wide, square = (
        loaded.processor(text="<image>", images=make_image(size), return_tensors="pt")
        for size in ((120, 30), (64, 64))
    )
    assert wide["pixel_values"].shape[1] == 3 and square["pixel_values"].shape[1] == 5


def test_qwen_grid_follows_the_shape_of_the_image(tiny_folder, make_image):
    processor = load_processor(tiny_folder("qwen2-vl"))
    batch = processor(text="<|image_pad|>", images=make_image((84, 28)), return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * 6 // 4


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("gemma3", ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]),
        ("gemma3-text", []),
        ("llava", ["<image>"]),
        ("llava-next", ["<image>"]),
        ("qwen2-vl", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]),
        ("qwen2.5-vl", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]),
        ("llama", []),
    ],
)
def test_media_token_ids(family, tokens, tiny_folder):
    loaded = load_model(ModelConfig(path=str(tiny_folder(family)), dtype="float32"))
    ids = media_token_ids(loaded.model.config, loaded.processor)
    assert ids == set(tokenizer_of(loaded.processor).convert_tokens_to_ids(tokens))


@families
def test_same_seed_same_files(family, tiny_folder, tmp_path):
    state = torch.random.get_rng_state()
    again = write_tiny(family, tmp_path / "again")
    other = write_tiny(family, tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    first = tiny_folder(family)
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert filecmp.cmpfiles(first, again, names, shallow=False) == (names, [], [])
    assert not filecmp.cmp(first / "model.safetensors", other / "model.safetensors", shallow=False)


def test_same_files_in_another_process(tiny_folder, tmp_path):
    code = f"from partwise.tiny import write_tiny; write_tiny('gemma3', {str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    first = tiny_folder("gemma3")
    names = sorted(file.name for file in first.iterdir())
    assert filecmp.cmpfiles(first, tmp_path / "there", names, shallow=False) == (names, [], [])


def test_sizes_reach_config_and_processor(tmp_path):
    folder = write_tiny(
        "gemma3",
        tmp_path / "m",
        text={"hidden_size": 32, "num_hidden_layers": 3},
        vision={"patch_size": 7},
        image_size=28,
        mm_tokens=1,
    )
    loaded = load_model(ModelConfig(path=str(folder), dtype="float32"))
    config = loaded.model.config
    assert config.text_config.hidden_size == 32 and len(config.text_config.layer_types) == 3
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (28, 7)
    assert config.mm_tokens_per_image == loaded.processor.image_seq_length == 1
    assert loaded.processor.image_processor.size["height"] == 28


@pytest.mark.parametrize(
    ("family", "sizes", "text"),
    [
        ("gema3", {}, "There is no tiny model of the family 'gema3'. Did you mean gemma3? Known: gemma3, "),
        ("llama", {"image_size": 28}, "A tiny llama has no size 'image_size'. It takes: text."),
        (
            "llama",
            {"text": {"hiden_size": 8}},
            "text.hiden_size is not a setting of LlamaConfig. Did you mean hidden_size?",
        ),
    ],
)
def test_refused_sizes(family, sizes, text, tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_tiny(family, tmp_path / "m", **sizes)
    assert str(caught.value).startswith(text)
    assert not (tmp_path / "m").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not an empty folder; nothing was written"):
        write_tiny("llama", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"
