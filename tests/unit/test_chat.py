"""Tokens and labels of conversations, held against golden files, transformers' own templates and plain text.

The golden files have a token per line: id, T where it is a label, token. To write them anew after a wanted
change, run this file with Python and read the diff.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as PILImage
from tokenizers.processors import ByteLevel
from transformers import LlavaProcessor

from partwise.data.chat import ChatFormat, prompt_inputs
from partwise.data.pixels import with_own_pixels
from partwise.data.preview import preview_example
from partwise.errors import ConfigError, DataError
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example, Image, Message, Text
from partwise.tiny import FAMILIES, write_tiny

GOLDEN = Path(__file__).parent / "golden"
TEXT_FAMILIES = ("gemma3-text", "llama")
IMAGE_FAMILIES = tuple(family for family in FAMILIES if family not in TEXT_FAMILIES)
END_OF_TURN = {
    "gemma3": "<end_of_turn>",
    "gemma3-text": "<end_of_turn>",
    "llava": "</s>",
    "llava-next": "</s>",
    "qwen2-vl": "<|im_end|>",
    "qwen2.5-vl": "<|im_end|>",
    "llama": "<|eot_id|>",
}
IMAGE_TOKEN = {
    "gemma3": "<image_soft_token>",
    "llava": "<image>",
    "llava-next": "<image>",
    "qwen2-vl": "<|image_pad|>",
    "qwen2.5-vl": "<|image_pad|>",
}


def picture(size: tuple[int, int] = (56, 56), color: str = "red") -> Image:
    return Image(PILImage.new("RGB", size, color), f"{color}.png")


def talk(
    *turns: str | tuple[Text | Image, ...], train: tuple[bool, ...] = (True, True), row: int = 6
) -> Conversation:
    """User and assistant in turn; `train` counts the answers."""
    messages = []
    for i, turn in enumerate(turns):
        contents = (Text(turn),) if isinstance(turn, str) else turn
        role = "assistant" if i % 2 else "user"
        messages.append(Message(role, contents, train=bool(i % 2) and train[i // 2]))
    return Conversation(tuple(messages), "train.jsonl", row)


def conversations(has_images: bool) -> dict[str, Conversation]:
    """The conversations of a golden file, by title."""
    first = (picture(), Text("What is this?")) if has_images else (Text("What is this?"),)
    second = (Text("And this?"), picture((112, 56), "blue")) if has_images else (Text("And this?"),)
    answers = ("It is a red circle.", "No:\ntwo  of them, é\N{GRINNING FACE}")
    found = {
        "one turn": talk(first, answers[0]),
        "two turns": talk(first, answers[0], second, answers[1]),
        "two turns, the first with train: false": talk(
            first, answers[0], second, answers[1], train=(False, True)
        ),
    }
    system = Message("system", (Text("Answer with one word."),), train=False)
    plain = talk("Hello!", "Hello!")
    found["system message, text only"] = Conversation((system, *plain.messages), "train.jsonl", 0)
    return found


def open_format(folder: Path, max_seq_len: int = 4096, overlong: str = "truncate") -> ChatFormat:
    processor = load_processor(folder)
    ids = media_token_ids(load_model_config(folder), processor)
    return ChatFormat(processor, ids, max_seq_len, overlong)


def tokenizer_of(chat_format: ChatFormat):
    return getattr(chat_format.processor, "tokenizer", chat_format.processor)


def golden_text(chat_format: ChatFormat, has_images: bool) -> str:
    lines = []
    for title, conversation in conversations(has_images).items():
        example = chat_format(conversation)
        tokens = tokenizer_of(chat_format).convert_ids_to_tokens(example.input_ids.tolist())
        lines.append(f"# {title}: {len(tokens)} tokens, {example.num_target_tokens} labels")
        for token_id, token, label in zip(
            example.input_ids.tolist(), tokens, example.labels.tolist(), strict=True
        ):
            assert label in (token_id, IGNORE_INDEX)
            lines.append(f"{token_id:>4} {'T' if label == token_id else '.'} {token}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def chat_format(tiny_folder: Callable[[str], Path]) -> Callable[..., ChatFormat]:
    """A ChatFormat of a family; the processor is loaded once."""
    loaded: dict[str, ChatFormat] = {}

    def make(family: str, max_seq_len: int = 4096, overlong: str = "truncate", template: str | None = None):
        if family not in loaded:
            loaded[family] = open_format(tiny_folder(family))
        found = loaded[family]
        processor = found.processor
        if template is not None:
            processor = copy.deepcopy(processor)
            processor.chat_template = template
        return ChatFormat(processor, found.media_token_ids, max_seq_len, overlong)

    return make


def trained_text(chat_format: ChatFormat, example: Example) -> str:
    return tokenizer_of(chat_format).decode(example.labels[example.labels != IGNORE_INDEX])


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_the_golden_file(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    text = golden_text(chat_format(family), family in IMAGE_FAMILIES)
    assert text == (GOLDEN / f"labels-{family}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_and_their_end_tokens(
    family: str, chat_format: Callable[..., ChatFormat]
) -> None:
    form, end = chat_format(family), END_OF_TURN[family]
    space = " " if family.startswith("llava") else ""  # follows the prompt in these templates
    for title, conversation in conversations(family in IMAGE_FAMILIES).items():
        example = form(conversation)
        answers = [m.contents[0].text for m in conversation.messages if m.train]
        assert trained_text(form, example) == "".join(space + answer + end for answer in answers), title
        assert example.num_target_tokens == int((example.labels != IGNORE_INDEX).sum())
        assert example.labels[0] == IGNORE_INDEX


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format(family)
    for conversation in conversations(family in IMAGE_FAMILIES).values():
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": c.text}
                    if isinstance(c, Text)
                    else {"type": "image", "image": c.source}
                    for c in message.contents
                ],
            }
            for message in conversation.messages
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        reference = form.processor.apply_chat_template(messages, **options)
        example = with_own_pixels(form(conversation))
        assert torch.equal(example.input_ids, reference["input_ids"][0])
        for name, tensor in {**example.token_fields, **example.media}.items():
            wanted = reference[name]
            assert torch.equal(tensor, wanted[0] if name in example.token_fields else wanted), name
        names = {"input_ids", "attention_mask", *example.token_fields, *example.media}
        assert names == set(reference)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_each_image_has_one_run_of_tokens(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format(family)
    example = form(conversations(True)["two turns"])
    image_id = tokenizer_of(form).convert_tokens_to_ids(IMAGE_TOKEN[family])
    is_image = (example.input_ids == image_id).int()
    assert int((is_image.diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).sum()) == 2
    assert (example.labels[is_image.bool()] == IGNORE_INDEX).all()
    if family == "gemma3":
        assert torch.equal(example.token_fields["token_type_ids"], is_image.long())


def test_text_rows_of_gemma3_keep_their_token_types(chat_format: Callable[..., ChatFormat]) -> None:
    example = chat_format("gemma3")(talk("Hello!", "Hello!"))
    assert example.token_fields["token_type_ids"].tolist() == [0] * len(example.input_ids)
    assert example.media == {}


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_an_image_in_an_answer_is_not_trained(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format(family)
    example = form(talk("Draw!", (Text("It is here:"), picture(), Text("a circle."))))
    text = trained_text(form, example)
    assert "It is here:" in text
    assert text.endswith("a circle." + END_OF_TURN[family])
    assert not form.media_token_ids & set(example.labels.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_beginning_of_the_example(
    family: str, chat_format: Callable[..., ChatFormat]
) -> None:
    form = chat_format(family)
    whole = conversations(family in IMAGE_FAMILIES)["two turns"]
    prompt = prompt_inputs(form.processor, Conversation(whole.messages[:3], "chat", 0))
    example = form(whole)
    num_tokens = prompt["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"][0], example.input_ids[:num_tokens])
    last_answer = trained_text(form, example).split(END_OF_TURN[family])[1].strip()
    after = example.labels[num_tokens:]
    assert tokenizer_of(form).decode(after[after != IGNORE_INDEX]).strip().startswith(last_answer)
    assert example.labels[num_tokens] != IGNORE_INDEX


@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2-vl", "llama"])
def test_truncation_never_cuts_an_image(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format(family)
    conversation = conversations(family in IMAGE_FAMILIES)["two turns"]
    encoded = form.encode(conversation)
    whole, images_end = encoded.example, encoded.images_end
    media = torch.tensor(sorted(form.media_token_ids) or [-1])
    assert (images_end > 0) == (family in IMAGE_FAMILIES)
    assert not torch.isin(whole.input_ids[images_end:], media).any()
    for limit in range(1, len(whole.input_ids) + 2):
        result = chat_format(family, limit).fit(encoded)
        if limit < images_end:
            assert result == Dropped("image would be cut", "train.jsonl", 6)
        elif (whole.labels[:limit] == IGNORE_INDEX).all():
            assert result == Dropped("no target token", "train.jsonl", 6)
        else:
            num_tokens = min(limit, len(whole.input_ids))
            assert torch.equal(result.input_ids, whole.input_ids[:num_tokens])
            assert torch.equal(result.labels, whole.labels[:num_tokens])
            assert result.num_target_tokens == int((result.labels != IGNORE_INDEX).sum())
            assert all(len(field) == num_tokens for field in result.token_fields.values())
            assert result.media is whole.media


def test_overlong_rows_are_dropped_or_refused(chat_format: Callable[..., ChatFormat]) -> None:
    conversation = talk("What is this?", "It is a red circle.")
    num_tokens = len(chat_format("llama")(conversation).input_ids)
    assert chat_format("llama", num_tokens - 1, "drop")(conversation) == Dropped("too long", "train.jsonl", 6)
    assert isinstance(chat_format("llama", num_tokens, "error")(conversation), Example)
    with pytest.raises(DataError) as error:
        chat_format("llama", num_tokens - 1, "error")(conversation)
    assert str(error.value) == (
        f"train.jsonl:7: the row has {num_tokens} tokens, data.max_seq_len is {num_tokens - 1}. "
        "Shorten the row, "
        "raise the limit, or set data.overlong to truncate or drop."
    )


def test_a_row_without_trained_answer_is_dropped(chat_format: Callable[..., ChatFormat]) -> None:
    conversation = talk("Hello!", "Hello!", train=(False,))
    assert chat_format("llama")(conversation) == Dropped("no target token", "train.jsonl", 6)


MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A: {% generation %}{{ message['content'] }}<|eot_id|>\n{% endgeneration %}"
    "{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_generation_marks_of_the_template_win(chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format("llama", template=MARKED)
    example = form(talk("one?", "one", "two?", "two"))
    # " one" is a token that holds the space of the prompt and the first letter of the answer.
    assert trained_text(form, example) == " one<|eot_id|> two<|eot_id|>"
    example = form(talk("one?", "one", "two?", "two", train=(False, True)))
    assert trained_text(form, example) == " two<|eot_id|>"


def test_marks_stay_in_place_behind_images(chat_format: Callable[..., ChatFormat]) -> None:
    plain = chat_format("gemma3")
    template = plain.processor.chat_template
    body = "{{- render(message['content']) | trim + '<end_of_turn>\\n' -}}"
    marked = template.replace(
        body,
        "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
        + body
        + "{%- endgeneration -%}{%- else -%}"
        + body
        + "{%- endif -%}",
    )
    assert marked.count("generation -%}") == 2
    for conversation in conversations(True).values():
        example = chat_format("gemma3", template=marked)(conversation)
        assert torch.equal(example.labels, plain(conversation).labels)


def test_a_template_without_end_token_trains_all_it_writes(chat_format: Callable[..., ChatFormat]) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    form = chat_format("llama", template=template)
    example = form(talk("one?", "one"))
    assert trained_text(form, example) == " one\n"


def test_white_space_without_offsets_is_trained(chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format("llama", template=chat_format("llama").processor.chat_template)
    form.processor.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    answer = "one  two\n\n   three"
    example = form(talk("a?", answer))
    assert trained_text(form, example) == answer + "<|eot_id|>"


def test_bos_comes_once(chat_format: Callable[..., ChatFormat]) -> None:
    for family in FAMILIES:
        form = chat_format(family)
        bos = tokenizer_of(form).bos_token_id
        ids = form(talk("Hello!", "Hello!")).input_ids
        if bos is not None:
            assert (ids == bos).nonzero().tolist() == [[0]], family
    template = chat_format("llama").processor.chat_template
    with pytest.raises(DataError) as error:
        chat_format("llama", template="chat: " + template)(talk("Hello!", "Hello!"))
    assert str(error.value) == (
        "train.jsonl:7: the chat template writes <|begin_of_text|>, but not first. Move it in "
        "model.chat_template."
    )
    form = chat_format("llama", template="{{ bos_token }}" + template)
    with pytest.raises(DataError) as error:
        form(talk("Hello!", "Hello!"))
    assert str(error.value) == (
        "train.jsonl:7: the text begins with two <|begin_of_text|>. Remove one from model.chat_template."
    )


PLAIN = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ messages | length }}" + PLAIN,
            "train.jsonl:7: the chat template is not prefix-stable: what it writes up to message 1 "
            "is not how it begins "
            "the whole conversation, so the answer cannot be told from the prompt. Put {% generation "
            "%} marks around "
            "the answers in model.chat_template, or end the row after its first answer.",
        ),
        (
            PLAIN.replace("m['content']", "m['content'] | upper"),
            "train.jsonl:7: message 1: the chat template does not write this answer word for word: "
            "'Hello!' became "
            "'assistant:HELLO!;'. Set train: false for it, or change model.chat_template.",
        ),
        (
            "{{ raise_exception('no greetings') }}",
            "train.jsonl:7: the chat template refuses the messages: no greetings. Change the "
            "messages, or give another "
            "model.chat_template.",
        ),
        (
            "{% generation %}{% endgeneration %}{% for m in messages %}{% generation %}x{% "
            "endgeneration %}{% endfor %}",
            "train.jsonl:7: the chat template marks 3 generations for 1 answers. Put one {% "
            "generation %} block around "
            "each assistant turn in model.chat_template.",
        ),
    ],
)
def test_templates_that_hide_the_answer_are_refused(
    template: str, text: str, chat_format: Callable[..., ChatFormat]
) -> None:
    with pytest.raises(DataError) as error:
        chat_format("llama", template=template)(talk("Hi!", "Hello!"))
    assert str(error.value) == text


def test_a_model_without_template_is_refused(chat_format: Callable[..., ChatFormat]) -> None:
    with pytest.raises(ConfigError) as error:
        chat_format("llama", template="")
    assert str(error.value) == (
        "model.chat_template: the model folder has no chat template, so messages cannot be written "
        "as text. Use the "
        "model's instruction-tuned version, or name a Jinja file in model.chat_template."
    )


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("gemma3", "<end_of_turn>"),
        ("gemma3", "<start_of_image>"),
        ("gemma3", "<image_soft_token>"),
        ("llava", "<image>"),
        ("llava", "</s>"),
        ("qwen2-vl", "<|im_end|>"),
        ("qwen2-vl", "<|image_pad|>"),
        ("llama", "<|eot_id|>"),
    ],
)
def test_control_tokens_in_a_text_are_refused(
    family: str, token: str, chat_format: Callable[..., ChatFormat]
) -> None:
    for turns, place in (
        (("a " + token, "b"), f"0 (user) contains \"{token}\" at character 2 ('a {token}')"),
        (("a", f"b{token}c"), f"1 (assistant) contains \"{token}\" at character 1 ('b{token}c')"),
    ):
        with pytest.raises(DataError) as error:
            chat_format(family)(talk(*turns))
        assert str(error.value) == (
            f"train.jsonl:7: the text of message {place}, a control token of this model: it would be read "
            "as the end of a turn or as an image, not as text. Rewrite it, with a space inside for "
            "instance, or remove the row."
        )


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        ChatFormat(SimpleNamespace(chat_template="x", is_fast=False), frozenset(), 64, "truncate")
    assert str(error.value) == (
        "model.path: the model has only a slow tokenizer, which cannot tell where its tokens stand "
        "in the text. "
        "Add its tokenizer.json to the model folder."
    )


def test_a_processor_that_hides_its_image_tokens_is_refused(chat_format: Callable[..., ChatFormat]) -> None:
    class Silent(LlavaProcessor):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            found.pop("text_replacement_offsets")
            return found

    form = chat_format("llava", template=chat_format("llava").processor.chat_template)
    form.processor.__class__ = Silent
    assert isinstance(form(talk("a?", "b")), Example)
    with pytest.raises(ConfigError) as error:
        form(talk((picture(), Text("?")), "b"))
    assert str(error.value) == (
        "model.path: Silent does not tell where its image tokens stand, so the answers cannot be "
        "found in rows "
        "with images. Use a model whose processor does."
    )


def test_images_for_a_text_model_are_refused(chat_format: Callable[..., ChatFormat]) -> None:
    with pytest.raises(DataError) as error:
        chat_format("llama")(talk((picture(), Text("?")), "b"))
    assert str(error.value) == (
        "train.jsonl:7: the row has images, but the model is a text model. Drop the images."
    )


def test_a_template_that_leaves_images_out_is_refused(chat_format: Callable[..., ChatFormat]) -> None:
    template = chat_format("llava").processor.chat_template.replace("<image>\\n", "")
    with pytest.raises(DataError) as error:
        chat_format("llava", template=template)(talk((picture(), Text("?")), "b"))
    assert str(error.value) == (
        'train.jsonl:7: the chat template wrote 0 "<image>", the row has 1 image. Name a template in '
        "model.chat_template that "
        "writes them in every role."
    )


def test_what_the_processor_refuses_names_the_row(chat_format: Callable[..., ChatFormat]) -> None:
    with pytest.raises(DataError) as error:
        chat_format("qwen2-vl")(talk((picture((600, 2)), Text("?")), "b"))
    assert str(error.value).startswith(
        "train.jsonl:7: the model's processor refuses the row: absolute aspect ratio"
    )


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl", "llama"])
def test_the_format_goes_to_other_processes(family: str, chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format(family)
    again = pickle.loads(pickle.dumps(form))
    conversation = conversations(family in IMAGE_FAMILIES)["two turns"]
    assert torch.equal(again(conversation).labels, form(conversation).labels)


def test_preview_names_images_and_colours_labels(chat_format: Callable[..., ChatFormat]) -> None:
    form = chat_format("llava")
    conversation = conversations(True)["two turns"]
    text = preview_example(form.processor, conversation, form(conversation), form.media_token_ids)
    assert text.plain == (
        "<s>USER: [image 1: 56x56 px, 16 tokens]\nWhat is this? ASSISTANT: It is a red circle.</s>"
        "USER: And this?[image 2: 112x56 px, 16 tokens]\n ASSISTANT: No:\ntwo  of them, "
        "é\N{GRINNING FACE}</s>"
        f"\ntrain.jsonl:7: {len(form(conversation).input_ids)} tokens, "
        f"{form(conversation).num_target_tokens} of them trained (green), 2 images\n"
    )
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"]
    assert green == [" It is a red circle.</s>", " No:\ntwo  of them, é\N{GRINNING FACE}</s>"]


def test_preview_of_adjacent_images_counts_their_tokens_together(
    chat_format: Callable[..., ChatFormat],
) -> None:
    form = chat_format(
        "llava", template=chat_format("llava").processor.chat_template.replace("<image>\\n", "<image>")
    )
    conversation = talk((picture(), picture(), Text("?")), "b")
    text = preview_example(form.processor, conversation, form(conversation), form.media_token_ids)
    assert "USER: [image: 32 tokens]? ASSISTANT: b</s>" in text.plain


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            form = open_format(write_tiny(family, Path(folder) / family))
            path = GOLDEN / f"labels-{family}.txt"
            path.write_text(golden_text(form, family in IMAGE_FAMILIES), encoding="utf-8")


if __name__ == "__main__":
    write_golden()
