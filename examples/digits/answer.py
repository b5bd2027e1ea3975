"""Answers to the held-out questions, in a fresh process, with plain transformers and no Partwise.

Usage: answer.py MODEL ROWS.jsonl OUT.json. Each question is asked alone, twice: with its image and with the
image of another row, which shows whether the model looks. Decoding is greedy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

BATCH_SIZE = 60


def answer_all(model_folder: str, rows_file: Path) -> list[dict]:
    """One record per row and question: image, question, truth, answer, answer to another row's image."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    records = read_questions(rows_file)
    images = [record["image"] for record in records]
    shuffled = other_images(images)
    answers = ask(model, processor, records, images)
    controls = ask(model, processor, records, shuffled)
    for record, text, control in zip(records, answers, controls, strict=True):
        record |= {"answer": text, "answer_to_shuffled": control, "image": str(record["image"])}
    return records


def read_questions(rows_file: Path) -> list[dict]:
    records = []
    for line in rows_file.read_text().splitlines():
        row = json.loads(line)
        question, truth = (message["content"] for message in row["messages"])
        image = rows_file.parent / row["images"][0]
        records.append({"image": image, "question": question.removeprefix("<image>"), "truth": truth})
    return records


def other_images(images: list[Path]) -> list[Path]:
    """The same images in another order, fixed by seed."""
    return [images[i] for i in np.random.default_rng(0).permutation(len(images))]


@torch.inference_mode()
def ask(model, processor, records: list[dict], images: list[Path]) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(records), BATCH_SIZE):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]}]
            for record in records[start : start + BATCH_SIZE]
        ]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=prompts,
            images=[[Image.open(path)] for path in images[start : start + BATCH_SIZE]],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


if __name__ == "__main__":
    model_folder, rows_file, out = sys.argv[1:]
    torch.set_num_threads(1)
    disable_progress_bar()
    Path(out).write_text(json.dumps(answer_all(model_folder, Path(rows_file)), indent=1))
