"""The config: what a run is, as one YAML file says it.

document.py reads YAML with places; flags.py turns the freeze flags into `parts`; sections.py and objective.py
hold the keys, rules.py the rules between them, tree.py joins them; `python -m partwise.config` writes
docs/config.md.
"""

from partwise.config.objective import ObjectiveConfig
from partwise.config.sections import (
    DataConfig,
    ModelConfig,
    PartConfig,
    PartsConfig,
    TrackConfig,
    TrainConfig,
)
from partwise.config.stages import StableConfig
from partwise.config.tree import Config, config_schema, dump_config, load_config

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PartConfig",
    "PartsConfig",
    "StableConfig",
    "TrackConfig",
    "TrainConfig",
    "config_schema",
    "dump_config",
    "load_config",
]
