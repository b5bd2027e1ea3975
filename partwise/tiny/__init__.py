"""Tiny random models: the real classes and file layout of a family, at a size that trains on a CPU.

write.py writes the folder; recipes.py holds the families' configs and processors, tokenizer.py their
tokenizers and chat templates.
"""

from partwise.tiny.write import FAMILIES, write_tiny

__all__ = ["FAMILIES", "write_tiny"]
