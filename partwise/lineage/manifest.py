"""partwise.json: what a folder is, what it was made from, and how.

In: a plan, the records of what it starts from, and data files. Out: the manifest as a dict. publish.py writes
it beside the weights. A record is what a folder's children keep of it: enough to tell the whole ancestry
when the folders themselves are gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import Fingerprint, fingerprint_files
from partwise.records import PartPlan, PartsPlan
from partwise.version import __version__

MANIFEST = "partwise.json"
FORMAT = 2
# What a record takes over from its folder's manifest.
RECORDED = ("kind", "step", "created", "data", "accepted_base", "parents")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that Partwise wrote; None for other folders and torn ones.

    Raises:
        CheckpointError: the manifest is broken, or of another version.
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


def make_manifest(
    plan: PartsPlan,
    base: dict[str, Any],
    data_files: Iterable[str],
    dtype: str,
    adapter: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run's checkpoints are and come from: records of its base, and of an adapter it goes on with."""
    files = [Path(file) for file in data_files]
    return {
        "format": FORMAT,
        "kind": "adapter" if plan.has_adapters else "full",
        "base": {key: base[key] for key in ("path", "fingerprint", "parts")},
        "parents": [adapter or base],
        "plan": {part.part: summarize_part(part) for part in plan.parts},
        "dtype": dtype,
        "data": {"files": [str(file) for file in files], "fingerprint": fingerprint_files(files)},
        "versions": library_versions(),
    }


def make_record(name: str, fingerprint: Fingerprint, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """What children keep of a folder: its name and weights, and where it comes from, as far as it says."""
    record: dict[str, Any] = {"path": name, "kind": "model"}
    if manifest:
        record |= told_by(manifest)
    return record | {"fingerprint": fingerprint.whole, "parts": fingerprint.parts}


def told_by(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a folder's manifest says of it, as records keep it."""
    modes = {
        part: plan["mode"] + (f" on {plan['quantization']['kind']}" if plan.get("quantization") else "")
        for part, plan in manifest.get("plan", {}).items()
    }
    return {"modes": modes, **{key: manifest[key] for key in RECORDED if key in manifest}}


def stamp_manifest(
    manifest: dict[str, Any],
    step: int,
    eval_loss: float | None = None,
    eval_scores: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The manifest of one checkpoint: the run's, with the steps done, the time (UTC), what was measured."""
    measured = {"eval_loss": eval_loss, "eval_scores": dict(eval_scores) if eval_scores else None}
    known = {name: value for name, value in measured.items() if value is not None}
    return {**manifest, "step": step, **known, "created": now()}


def library_versions() -> dict[str, str]:
    return {"partwise": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
