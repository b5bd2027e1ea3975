"""Partwise: fine-tune multimodal language models part by part, and know exactly what trains.

import partwise

config = partwise.load_config("config.yaml", ["train.steps=100"])
partwise.check(config)            # findings, as `partwise check` prints them
final = partwise.train(config)    # the folder of the trained model
loaded = partwise.open_chat(final)
partwise.answer(loaded, [partwise.user_message("Which digit is this?", [image])])
partwise.evaluate(final, ["held_out.jsonl"]).judgement.scores
partwise.find_parts(loaded.model) # the parts of any transformers model
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from partwise.version import __version__ as __version__

if TYPE_CHECKING:
    from partwise.config import Config as Config
    from partwise.config import load_config as load_config
    from partwise.errors import StoppedError as StoppedError
    from partwise.errors import UserError as UserError
    from partwise.export.folder import ExportOptions as ExportOptions
    from partwise.export.folder import export_runs as export_runs
    from partwise.model.find import find_parts as find_parts
    from partwise.model.load import load_model as load_model
    from partwise.run import cache as cache
    from partwise.run import check as check
    from partwise.run import train as train
    from partwise.serve.chat import answer as answer
    from partwise.serve.chat import open_chat as open_chat
    from partwise.serve.chat import user_message as user_message
    from partwise.serve.evaluate import EvalOptions as EvalOptions
    from partwise.serve.evaluate import evaluate as evaluate

# bitsandbytes, which PEFT imports where it is installed, warns on some CPUs that a kernel for inference there
# is missing. It is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Where DeepSpeed is installed, PEFT imports it, and on a CPU it says so on stdout, where answers are printed.
logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())

# Imported when first asked for, so that `import partwise` and `partwise --help` stay light.
_HOMES = {
    "Config": "partwise.config",
    "EvalOptions": "partwise.serve.evaluate",
    "ExportOptions": "partwise.export.folder",
    "StoppedError": "partwise.errors",
    "UserError": "partwise.errors",
    "answer": "partwise.serve.chat",
    "cache": "partwise.run",
    "check": "partwise.run",
    "evaluate": "partwise.serve.evaluate",
    "export_runs": "partwise.export.folder",
    "find_parts": "partwise.model.find",
    "load_config": "partwise.config",
    "load_model": "partwise.model.load",
    "open_chat": "partwise.serve.chat",
    "train": "partwise.run",
    "user_message": "partwise.serve.chat",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'partwise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
