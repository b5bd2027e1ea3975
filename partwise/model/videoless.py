"""Processors with a video part, on machines without torchvision.

Several processors (Qwen2-VL and its successors first) take a video processor, and transformers' video
processors need torchvision, so that images alone cannot be processed without it either. In: such a class.
Out: a subclass that works without the video part; it keeps the video settings unread and writes them back,
so the folders it saves are the ones the class itself would save. Not done here: processing videos.

Upstream: ProcessorMixin treats every argument of `__init__` that names a modality as required (transformers
5.23). Remove this file when AutoProcessor loads these processors without torchvision.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.models.auto.video_processing_auto import get_video_processor_config


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The subclass of `processor_class`, under the same name, whose parts leave the video processor out."""

    class WithoutVideo(processor_class):
        video_settings: dict[str, Any] | None = None

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
            processor = super().from_pretrained(path, **kwargs)
            processor.video_settings = get_video_processor_config(path)
            return processor

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "video_processor": self.video_settings}

        def __reduce__(self) -> tuple[Any, ...]:
            return _restore, (processor_class, self.__dict__)

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = processor_class.__name__
    return WithoutVideo


def _restore(processor_class: type[ProcessorMixin], state: dict[str, Any]) -> ProcessorMixin:
    """Unpickles for a worker process: the class is made anew there, since it has no importable name."""
    processor = object.__new__(without_video(processor_class))
    processor.__dict__.update(state)
    return processor
