"""Is a saved folder the trained model? A fresh process with plain transformers and PEFT says so.

In: a folder, and a Probe of the model that it was saved from. Out: a Finding with the difference and its
cost, or a CheckpointError that says what differs. The process is reload.py; it runs beside its caller, who
asks for the result later or waits for it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from partwise.errors import CheckpointError
from partwise.records import Finding

# The largest difference of logits, as a fraction of their norm. The same weights with the same kernels differ
# by nothing. Any other kernel moves bfloat16 logits to its noise, 2e-2 on 26 layers, and fp32 ones by 2e-6
# (measured on an H100 against its host: docs/checkpoints.md); noise grows with depth.
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
OTHER_DEVICE_LIMITS = {"float32": 1e-4, "bfloat16": 1e-1}

SCRIPT = Path(__file__).with_name("reload.py")
SENTENCE = "Which of the 7 things is this? It's a “naïve” 数字, isn't it?\n"


@dataclass(frozen=True)
class InputSide:
    """What a reloaded tokenizer, processor and chat template are compared with."""

    token_ids: list[int]
    processor: str
    chat_template: str

    @classmethod
    def of(cls, processor: Any) -> InputSide:
        tokenizer = getattr(processor, "tokenizer", processor)
        template = processor.chat_template
        return cls(
            token_ids=tokenizer(SENTENCE)["input_ids"],
            processor="" if tokenizer is processor else type(processor).__name__,
            chat_template=template if isinstance(template, str) else "",
        )


@dataclass(frozen=True)
class Probe:
    """A few rows as the model's own inputs, one dict a row, and what a trained model says about them.

    `logits` are its logits at the last positions of each row, (positions, V) in fp32; none where another
    folder is the measure. `device` is where they were computed, `dtype` and `attention` how.
    """

    rows: tuple[dict[str, Tensor], ...]
    logits: tuple[Tensor, ...]
    num_logits: int
    input_side: InputSide
    dtype: str
    device: str
    num_weights: int
    attention: str = "sdpa"
    trust_remote_code: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """By the names that reload.py reads: inputs/ROW/NAME and trained/ROW/logits."""
        tensors: dict[str, Tensor] = {}
        for i, row in enumerate(self.rows):
            tensors[f"inputs/{i}/num_logits"] = torch.tensor(self.num_logits)
            tensors.update({f"inputs/{i}/{name}": tensor.contiguous() for name, tensor in row.items()})
        for i, logits in enumerate(self.logits):
            tensors[f"trained/{i}/logits"] = logits.contiguous()
        return tensors


def start_verification(
    folder: Path,
    probe: Probe,
    reference: Path | None = None,
    limit: float | None = None,
    name: Path | None = None,
    quantization: Mapping[str, dict[str, Any] | None] | None = None,
    device: str | None = None,
) -> Verification:
    """A fresh process that loads the folder and compares; it runs on while the caller does other things.

    The folder must stay until `finish`. `reference` is a folder that gives the logits instead of the probe,
    `limit` the largest difference that is allowed, `name` the folder's name to be. `quantization` is, by
    folder, what BitsAndBytesConfig must be told of a base that was quantised in training; `device` where to
    compute, instead of where the probe was, if there is room.
    """
    scratch = tempfile.TemporaryDirectory(prefix="partwise-verify-")
    job = write_job(Path(scratch.name), folder, probe, reference, quantization)
    job["device"] = device or probe.device
    job_file = Path(scratch.name) / "job.json"
    job_file.write_text(json.dumps(job))
    output, errors = (Path(scratch.name) / name for name in ("out", "err"))
    with output.open("w") as out, errors.open("w") as err:
        # -P: the script's own folder is not searched for modules.
        process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    return Verification(name or folder, process, scratch, probe, limit)


def write_job(
    scratch: Path,
    folder: Path,
    probe: Probe,
    reference: Path | None = None,
    quantization: Mapping[str, dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """What reload.py is to do, with the probe's tensors in a file in `scratch`."""
    probe_file = str(scratch / "probe.safetensors")
    save_file(probe.tensors(), probe_file)
    return {
        "folder": str(folder),
        "reference": str(reference) if reference else "",
        "probe": probe_file,
        "started": time.time(),
        "dtype": probe.dtype,
        "device": probe.device,
        "num_weights": probe.num_weights,
        "attention": probe.attention,
        "trust_remote_code": probe.trust_remote_code,
        "quantization": dict(quantization or {}),
        "text": SENTENCE,
        **asdict(probe.input_side),
    }


@dataclass(frozen=True)
class Verification:
    """One that is under way. `finish` waits for it, once."""

    folder: Path
    process: subprocess.Popen
    scratch: tempfile.TemporaryDirectory
    probe: Probe
    limit: float | None = None

    def is_done(self) -> bool:
        return self.process.poll() is not None

    def cancel(self) -> None:
        """Ends the process without a result."""
        self.process.kill()
        self.process.wait()
        self.scratch.cleanup()

    def finish(self) -> Finding:
        """How far the logits are apart, and what it cost; a warning where the process could not say.

        Raises:
            CheckpointError: the folder does not load, or is not the trained model.
        """
        try:
            code = self.process.wait()
            lines = (Path(self.scratch.name) / "out").read_text().splitlines()
            errors = (Path(self.scratch.name) / "err").read_text().splitlines()
        except BaseException:
            self.cancel()
            raise
        self.scratch.cleanup()
        result = json.loads(lines[-1]) if code == 0 and lines else {}
        if not result or "unable" in result:
            why = result.get("unable") or f"code {code}: {errors[-1] if errors else 'killed?'}"
            return unverified(self.folder, why)
        return judge(self.folder, self.probe, result, self.limit)


def unverified(folder: Path, why: str) -> Finding:
    return Finding(
        "verify",
        "warning",
        f"{folder} is written, but was not verified in a fresh process: {why}. That takes memory for "
        "the model once more; train.verify: off, or --verify off, leaves it out",
        values={"folder": str(folder)},
    )


def judge(folder: Path, probe: Probe, result: dict[str, Any], limit: float | None = None) -> Finding:
    """The verdict on what the fresh process found. Raises: CheckpointError, as `Verification.finish`."""
    assert not result["imports_partwise"], "the fresh process must load the folder as everyone does"
    error = result.get("relative_error", math.inf)
    fault = result.get("fault")
    moved_device = "device" in result and torch.device(probe.device).type != result["device"]
    if limit is None:
        limit = (OTHER_DEVICE_LIMITS if moved_device else LIMITS)[probe.dtype]
    if fault is None and not error <= limit:
        fault = (
            f"logits of {result['num_rows']} rows differ by {error:.1e} of their norm, in {result['dtype']} "
            f"at most {limit:.0e} is allowed, so weights were changed or lost"
        )
    if fault:
        raise CheckpointError(
            f"{folder} is not the trained model when a fresh process loads it: {fault.rstrip('.')}. Do not "
            "use it. Write it again from the run's newest checkpoint; if that fails too, the disk or the "
            "versions of transformers and peft are at fault."
        )
    where = f" on the {result['device']}" if moved_device else ""
    return Finding(
        "verify",
        "info",
        f"verified in a fresh process{where}: logits differ by {error:.1g} of their norm, "
        f"{result['seconds']:.1f} s",
        values={"folder": str(folder), **result},
    )
