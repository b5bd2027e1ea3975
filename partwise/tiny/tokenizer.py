"""The small tokenizers and chat templates of the tiny models.

In: the name of a family. Out: a fast tokenizer with the family's special tokens and turn format. The
vocabulary is a byte-level BPE, so any text comes back unchanged from encode and decode; its merges are
trained on the corpus below, which holds the words of short questions and answers. A digit is one token.
Not done here: images; a processor puts their placeholders in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

NUM_TRAINED_TOKENS = 496

# A newline, a digit and a run of spaces stand alone, so a turn's text never merges with its markers.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+"

CORPUS = """
Which digit is this? The digit is zero. What number is in this image? This is a digit, number one.
What is in this picture? This picture shows a red circle. What color is the square? The square is blue.
What shape is this? It is a green triangle. How many circles are there? There are two of them.
Is this a cat or a dog? It is a cat. Is there a person in the image? Yes, there is. No, there is not.
Describe the image. Describe this image in one word. A small yellow star is on the left of a large circle.
Where is the black square? It is on the right. What is the color of the circle? The color is white.
Read the text in the image. What does it say? Answer with one word. Answer the question. Look at the picture.
Which of these is larger? The first is larger than the second. What do you see here? I see a purple shape.
You are a helpful assistant. You answer in few words. Please write only the number. Thank you. Hello!
one two three four five six seven eight nine ten red green blue yellow black white orange purple brown pink
user model assistant system user model assistant system USER: ASSISTANT: USER: ASSISTANT: [INST] [/INST]
"""


def _content(image: str) -> str:
    """A Jinja macro that writes a turn's content: a string, or typed parts in their order."""
    return (
        "{%- macro render(content) -%}"
        "{%- if content is string -%}{{- content -}}"
        "{%- else -%}{%- for part in content -%}"
        "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        f"{{%- elif part['type'] == 'image' -%}}{{{{- {image!r} -}}}}"
        "{%- else -%}{{- raise_exception('this model takes text and images, not ' + part['type']) -}}"
        "{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    )


# The system text goes into the first user turn; after it, user and model must take turns.
_ALTERNATING = (
    "{%- set system = '' -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = render(messages[0]['content']) | trim + '\\n\\n' -%}{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate: user, assistant, user, ...') -}}{%- endif -%}"
)

GEMMA = (
    _content("<start_of_image>")
    + "{{- bos_token -}}"
    + _ALTERNATING
    + "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') -}}"
    "{{- render(message['content']) | trim + '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)

VICUNA = (
    _content("<image>\n") + _ALTERNATING + "{%- if message['role'] == 'user' -%}"
    "{{- (system if loop.first else '') + 'USER: ' + render(message['content']) + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' + render(message['content']) | trim + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)

# The end of a user turn is already the start of the answer, so add_generation_prompt has nothing to add.
MISTRAL = (
    _content("<image>\n") + _ALTERNATING + "{%- if message['role'] == 'user' -%}"
    "{{- '[INST] ' + (system if loop.first else '') + render(message['content']) + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + render(message['content']) | trim + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

LLAMA3 = (
    _content("") + "{{- bos_token -}}" + "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- render(message['content']) | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

CHATML = (
    _content("<|vision_start|><|image_pad|><|vision_end|>") + "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + render(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens and turn format of a family.

    `first` have the lowest ids and `last` the highest, as in the family's own vocabulary. `adds_bos` says
    whether encoding a plain text puts `bos` in front. `end_of_turn` closes an assistant turn; `stops` are
    all tokens that end a generation. `named` are attributes that the family's processor reads.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    eos: str
    pad: str
    chat_template: str
    stops: tuple[str, ...]
    bos: str | None = None
    unk: str | None = None
    adds_bos: bool = False
    padding_side: str = "left"
    named: dict[str, str] = field(default_factory=dict)


GEMMA3_TOKENS = SpecialTokens(
    first=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    last=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    stops=("<eos>", "<end_of_turn>"),
    adds_bos=True,
    chat_template=GEMMA,
    named={
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
)

VICUNA_TOKENS = SpecialTokens(
    first=("<unk>", "<s>", "</s>"),
    last=("<image>", "<pad>"),
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    unk="<unk>",
    stops=("</s>",),
    adds_bos=True,
    chat_template=VICUNA,
    named={"image_token": "<image>"},
)

MISTRAL_TOKENS = replace(VICUNA_TOKENS, chat_template=MISTRAL)

LLAMA3_TOKENS = SpecialTokens(
    first=(),
    last=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    adds_bos=True,
    padding_side="right",
    chat_template=LLAMA3,
)

QWEN_TOKENS = SpecialTokens(
    first=(),
    last=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|im_end|>", "<|endoftext|>"),
    chat_template=CHATML,
)


def build_tokenizer(special: SpecialTokens) -> PreTrainedTokenizerFast:
    """A tokenizer of about 500 entries; the same one on every call."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=NUM_TRAINED_TOKENS,
        special_tokens=list(special.first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS.strip().splitlines(keepends=True), trainer)
    core.add_special_tokens(list(special.last))
    if special.adds_bos and special.bos:
        core.post_processor = TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A {special.bos} $B",
            special_tokens=[(special.bos, core.token_to_id(special.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=special.bos,
        eos_token=special.eos,
        pad_token=special.pad,
        unk_token=special.unk,
        padding_side=special.padding_side,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=special.named,
        chat_template=special.chat_template,
    )
