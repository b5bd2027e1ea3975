"""partwise.json: what a folder is, what it was made from, and how.

In: a model, its plan and data files. Out: the manifest as a dict. publish.py writes it beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import base_fingerprint, fingerprint_files
from partwise.records import PartPlan, PartsPlan

if TYPE_CHECKING:
    from partwise.model.load import LoadedModel

MANIFEST = "partwise.json"
FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that Partwise wrote; None for other folders and torn ones.

    Raises:
        CheckpointError: the manifest is broken, or of a newer version.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. The folder is damaged; use another one."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(
            f"{path}: format {found!r} is not {FORMAT}. Use the Partwise version that wrote it."
        )
    return manifest


def make_manifest(loaded: LoadedModel, plan: PartsPlan, data_files: Iterable[str]) -> dict[str, Any]:
    """What a run's checkpoints come from: base and data with fingerprints, plan, versions."""
    files = [Path(file) for file in data_files]
    return {
        "format": FORMAT,
        "kind": "adapter" if plan.has_adapters else "full",
        "base": {"path": loaded.name, "fingerprint": base_fingerprint(loaded.path)},
        "plan": {part.part: summarize_part(part) for part in plan.parts},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "data": {"files": [str(file) for file in files], "fingerprint": fingerprint_files(files)},
        "versions": {name: version(name) for name in ("partwise", "torch", "transformers", "peft")},
    }


def stamp_manifest(manifest: dict[str, Any], step: int) -> dict[str, Any]:
    """The manifest of one checkpoint: the run's, with the steps done and the time (UTC)."""
    return {**manifest, "step": step, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def summarize_part(part: PartPlan) -> dict[str, Any]:
    return {
        "mode": part.mode,
        "num_parameters": part.num_parameters,
        "num_trainable": part.num_trainable,
        "learning_rate": part.learning_rate,
        "weight_decay": part.weight_decay,
        "held": part.held,
        "quantization": part.quantization
        and {"kind": part.quantization.kind, "is_double": part.quantization.is_double},
    }
