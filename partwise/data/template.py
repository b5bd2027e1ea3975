"""Messages -> the text that the model's own chat template writes, and where the answers stand in it.

In: a processor or tokenizer and Messages. Out: strings and character spans. Answers are found by the
template's {% generation %} marks where it has them, otherwise by rendering the conversation up to each
answer; a template that rewrites what came before is refused. Nothing is tokenised here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from partwise.errors import ConfigError, DataError
from partwise.records import Message, Span, Text

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def chat_template(processor: Any) -> str:
    """The default chat template, as Jinja source.

    Raises:
        ConfigError: the model has none.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            "model.chat_template: the model folder has no chat template, so messages cannot be written as "
            "text. Use the model's instruction-tuned version, or name a Jinja file in model.chat_template."
        )
    return template


def render(processor: Any, messages: Sequence[Message], row: str, add_generation_prompt: bool = False) -> str:
    """The conversation as the model's chat template writes it.

    Raises:
        DataError: the template refuses the messages, such as two user messages in a row.
    """
    return _render(processor, messages, row, add_generation_prompt=add_generation_prompt)[0]


def special_tokens(processor: Any) -> tuple[str, ...]:
    """All special tokens of the vocabulary; a tokenizer's all_special_tokens names only those with a role."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special)


def end_of_turn(processor: Any) -> int | None:
    """The id of the special token that the chat template ends an answer with; None where it writes none.

    None also where it cannot write a plain question and its answer: then rows are refused, if they are alike.
    """
    chat = (Message("user", (Text("question"),)), Message("assistant", (Text("answer"),)))
    special = special_tokens(processor)
    try:
        text, [(start, end)] = render_answers(processor, chat, "a question and its answer", special)
    except (ConfigError, DataError):
        return None
    marks = [token for token in special if text[start:end].endswith(token)]
    return tokenizer_of(processor).convert_tokens_to_ids(max(marks, key=len)) if marks else None


def render_answers(
    processor: Any, messages: Sequence[Message], row: str, special: tuple[str, ...]
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and the span of each trained answer with its end-of-turn token.

    White space that the template writes after the end-of-turn token, one of `special`, is outside the span.

    Raises:
        DataError: an answer cannot be found, or is not in the text word for word.
    """
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if GENERATION_MARK.search(chat_template(processor)):
        text, spans = _render(processor, messages, row, return_assistant_tokens_mask=True)
        if len(spans) != len(answers):
            raise DataError(
                f"{row}: the chat template marks {len(spans)} generations for {len(answers)} answers. "
                "Put one {% generation %} block around each assistant turn in model.chat_template."
            )
    else:
        text = render(processor, messages, row)
        spans = [_span_by_prefix(processor, messages, i, text, row) for i in answers]
    trained = [(i, span) for i, span in zip(answers, spans, strict=True) if messages[i].train]
    for i, (start, end) in trained:
        _check_verbatim(messages[i], text[start:end], f"{row}: message {i}")
    return text, [_end_at_turn(text, span, special) for _, span in trained]


def _render(processor: Any, messages: Sequence[Message], row: str, **options: Any) -> tuple[str, list[Span]]:
    try:
        texts, spans = render_jinja_template(
            conversations=[_template_messages(processor, messages)],
            chat_template=chat_template(processor),
            **tokenizer_of(processor).special_tokens_map,
            **options,
        )
    except TemplateError as error:
        raise DataError(
            f"{row}: the chat template refuses the messages: {error}. "
            "Change the messages, or give another model.chat_template."
        ) from None
    return texts[0], spans[0] if spans else []


def _template_messages(processor: Any, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Typed parts for processors; templates of text models take a string."""
    if tokenizer_of(processor) is processor:
        return [
            {"role": m.role, "content": "".join(c.text for c in m.contents if isinstance(c, Text))}
            for m in messages
        ]
    return [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": c.text} if isinstance(c, Text) else {"type": "image"}
                for c in m.contents
            ],
        }
        for m in messages
    ]


def _span_by_prefix(processor: Any, messages: Sequence[Message], turn: int, text: str, row: str) -> Span:
    """From the end of the generation prompt to the end of the turn."""
    prompt = render(processor, messages[:turn], row, add_generation_prompt=True)
    prompt_and_answer = render(processor, messages[: turn + 1], row)
    if not text.startswith(prompt) or not text.startswith(prompt_and_answer):
        raise DataError(
            f"{row}: the chat template is not prefix-stable: what it writes up to message {turn} is not how "
            "it begins the whole conversation, so the answer cannot be told from the prompt. Put "
            "{% generation %} marks around the answers in model.chat_template, or end the row after its "
            "first answer."
        )
    return len(prompt), len(prompt_and_answer)


def _check_verbatim(message: Message, answer: str, where: str) -> None:
    for content in message.contents:
        if isinstance(content, Text) and content.text.strip() not in answer:
            raise DataError(
                f"{where}: the chat template does not write this answer word for word: {content.text[:40]!r} "
                f"became {answer[:60]!r}. Set train: false for it, or change model.chat_template."
            )


def _end_at_turn(text: str, span: Span, special: tuple[str, ...]) -> Span:
    start, end = span
    trimmed = text[start:end].rstrip()
    return (start, start + len(trimmed)) if trimmed.endswith(special) else span
