"""Partwise: fine-tune multimodal language models part by part, and know exactly what trains."""

__version__ = "0.1.0"
