"""Write docs/config.md: `python -m partwise.config > docs/config.md`."""

from partwise.config import config_schema
from partwise.config.reference import write_reference

print(write_reference(config_schema()), end="")
