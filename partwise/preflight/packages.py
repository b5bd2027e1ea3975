"""Are the optional packages installed that the config needs? Looked at first; nothing is imported."""

from __future__ import annotations

from partwise.model.quantize import require_bitsandbytes
from partwise.preflight.context import Context
from partwise.records import PART_NAMES, Finding
from partwise.trackers.libraries import require_tracker


def check_packages(context: Context) -> list[Finding]:
    """The optional packages that the config needs are installed.

    Raises:
        ConfigError: one is missing; names the key that needs it.
    """
    config = context.config
    for part in PART_NAMES:
        settings = config.parts.settings(part)
        if settings and settings.quantization:
            key = f"parts.{part}.quantization"
            require_bitsandbytes(f"{config.where(key)}: {key}: {settings.quantization}")
    for name in config.tracking.to if config.tracking else ():
        require_tracker(name, f"{config.where('track')}: track: {name}")
    return []
