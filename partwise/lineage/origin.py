"""What a run or an export starts from: its record, and whether it is what it should be.

In: model and adapter folders. Out: records for manifest.py. An adapter computes nonsense on other weights
than those it was trained on, so another base is an error that says which parts differ, unless it is accepted
in so many words; then the manifest says that, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.errors import CheckpointError
from partwise.lineage.checksums import verify_files
from partwise.lineage.fingerprint import Fingerprint, weights_fingerprint
from partwise.lineage.manifest import MANIFEST, make_record, read_manifest
from partwise.model.folder import adapter_file, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_record(folder: Path, name: str, model: PreTrainedModel) -> dict[str, Any]:
    """The record of a whole model's folder. `model` may be on the meta device.

    Raises:
        CheckpointError: the weights are not whole.
    """
    return make_record(name, weights_fingerprint(weight_files(folder), model), read_manifest(folder))


def adapter_record(folder: Path, model: PreTrainedModel, base: dict[str, Any]) -> dict[str, Any]:
    """The record of an adapter folder. `model` is its base, and may be on the meta device; `base` its record.

    Raises:
        CheckpointError: its weights are missing or not whole.
    """
    fingerprint = weights_fingerprint([adapter_file(folder)], model)
    record = make_record(str(folder.resolve()), fingerprint, read_manifest(folder))
    return {"parents": [base], **record, "kind": "adapter"}


def require_whole(folder: Path) -> None:
    """Raises: CheckpointError where the weights of a folder that Partwise wrote are not those it wrote."""
    manifest = read_manifest(folder) or {}
    weights = [name for name in manifest.get("files", {}) if name.endswith(".safetensors")]
    if faults := verify_files(folder, manifest, weights):
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(faults)}. Copy it again. If its weights were changed on "
            f"purpose, delete {folder / MANIFEST}: it is a model of unknown origin then."
        )


def match_base(adapter: Path, base: dict[str, Any], accept: bool) -> dict[str, Any] | None:
    """None where the record `base` is what the adapter was trained on, or where the adapter does not say.

    With `accept`, what differs, to be kept in the manifest of what is made from the two.

    Raises:
        CheckpointError: it is another base; the text names both and the parts that differ.
    """
    manifest = read_manifest(adapter)
    if manifest is None or manifest["base"]["fingerprint"] == base["fingerprint"]:
        return None
    recorded = manifest["base"]
    differing = Fingerprint(base["parts"]).differing(recorded["parts"])
    if accept:
        return {"recorded": recorded, "differing": differing}
    names = f"{' and '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}"
    raise CheckpointError(
        f"{adapter}: the adapter was trained on another base than what {base['path']} holds now: {names} "
        f"(it was {recorded['path']} with fingerprint {recorded['fingerprint'][:12]}, now it is "
        f"{base['fingerprint'][:12]}). Put the original base back, or say that you accept the other one: "
        "--accept-base, or model.accept_base: true in a config."
    )
