"""Answers from a model, adapter or run folder, streamed to the terminal or returned as text.

In: a folder and a conversation. Out: the model's greedy answer through its own chat template.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image as PILImage
from transformers import TextStreamer

from partwise.config import ModelConfig
from partwise.data.chat import prompt_inputs
from partwise.data.rows import parse_image
from partwise.data.template import tokenizer_of
from partwise.engine.device import pick_device
from partwise.errors import DataError
from partwise.evaluation.generate import generate_answers
from partwise.export.adapter import open_adapter
from partwise.export.folder import final_folder
from partwise.model.folder import is_adapter
from partwise.model.load import LoadedModel, load_model
from partwise.records import Conversation, Message, Text


def open_chat(
    folder: str | Path, dtype: str = "float32", trust_remote_code: bool = False, accept_base: bool = False
) -> LoadedModel:
    """The model of a model, adapter or run folder on the device at hand, in eval mode.

    Raises:
        CheckpointError: nothing there can be loaded.
    """
    device = pick_device()
    path = final_folder(Path(folder))
    dtype = "bfloat16" if device.type == "cuda" else dtype
    if is_adapter(path):
        return open_adapter(path, dtype, device, trust_remote_code, accept_base)
    settings = ModelConfig(path=str(path), dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    loaded = load_model(settings, device=device)
    loaded.model.eval()
    return loaded


def answer(
    loaded: LoadedModel,
    messages: list[Message],
    max_new_tokens: int = 256,
    streamer: TextStreamer | None = None,
) -> str:
    """The model's answer to the last user message, decoded greedily, without special tokens."""
    conversation = Conversation(tuple(messages), source="chat", row=0)
    prompt = prompt_inputs(loaded.processor, conversation)
    return generate_answers(loaded.model, loaded.processor, [prompt], max_new_tokens, streamer)[0]


def user_message(text: str, images: Sequence[str | Path | bytes | PILImage.Image] = ()) -> Message:
    """A user's turn: the images, then the text. Images are paths, data: URLs, bytes or PIL images.

    Raises:
        DataError: an image is none of these.
    """
    parsed = [
        parse_image(str(image) if isinstance(image, Path) else image, Path.cwd(), f"images[{i}]")
        for i, image in enumerate(images)
    ]
    return Message(role="user", contents=(*parsed, Text(text)))


def run_chat(
    folder: Path,
    image_paths: list[str],
    prompt: str | None,
    max_new_tokens: int,
    trust_remote_code: bool = False,
    accept_base: bool = False,
    read: Callable[[str], str] = input,
) -> None:
    """Ask once with `prompt`, or talk until an empty line or end of input; images go with the first question.

    In a talk, a question that cannot be asked is refused, and the talk goes on without it.

    Raises:
        CheckpointError: the folder cannot be loaded.
        DataError: an image is missing, or the model takes none.
    """
    for path in image_paths:
        if not Path(path).is_file():
            raise DataError(f"--image: there is no file {path} (from {Path.cwd()}). Correct the path.")
    loaded = open_chat(folder, trust_remote_code=trust_remote_code, accept_base=accept_base)
    if image_paths and not hasattr(loaded.processor, "image_processor"):
        raise DataError(f"--image: {folder} is a text model and takes no images. Leave --image out.")
    streamer = TextStreamer(tokenizer_of(loaded.processor), skip_prompt=True, skip_special_tokens=True)
    messages: list[Message] = []
    question = prompt if prompt is not None else ask_user(read)
    while question:
        messages.append(user_message(question, () if messages else image_paths))
        try:
            text = answer(loaded, messages, max_new_tokens, streamer)
            messages.append(Message(role="assistant", contents=(Text(text),)))
        except DataError as error:
            if prompt is not None:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
        question = None if prompt is not None else ask_user(read)


def ask_user(read: Callable[[str], str]) -> str | None:
    try:
        return read("> ").strip() or None
    except EOFError:
        print()
        return None
