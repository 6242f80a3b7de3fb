"""The one configuration tree: YAML file -> ``key.sub=value`` overrides -> validated objects.

Every key a run understands is a field of a section here, with its default and its meaning; ``default.yaml`` is what a
run without a file does. Unknown keys, wrong types and impossible values are refused in one line that names the key.
What needs the outside world to be checked (folders, tokenizers, rank counts) is checked by ``planning``.
"""

from ultrafuser_mega.config.checkpoint import Checkpoint
from ultrafuser_mega.config.data import Data, DataClass
from ultrafuser_mega.config.distillation import KINDS, Distil, Kind
from ultrafuser_mega.config.evaluation import Evaluation
from ultrafuser_mega.config.fuser import FuserConfig
from ultrafuser_mega.config.gate import GateOptions
from ultrafuser_mega.config.layouts import ColocatedLayout, DisjointLayout, Layout, Parallel, Sizes
from ultrafuser_mega.config.load import default_config_text, dump_config, load_config
from ultrafuser_mega.config.lora import TARGETS, Lora
from ultrafuser_mega.config.loss import Loss
from ultrafuser_mega.config.parts import GATE, HEADS, TrainedPart, check_parts, in_words
from ultrafuser_mega.config.reporting import Profile, Report
from ultrafuser_mega.config.specialists import Specialist
from ultrafuser_mega.config.stages import Optimizer, Part, Stage, Stage2
from ultrafuser_mega.config.toy import Toy

__all__ = [
    "GATE",
    "HEADS",
    "KINDS",
    "TARGETS",
    "Checkpoint",
    "ColocatedLayout",
    "Data",
    "DataClass",
    "DisjointLayout",
    "Distil",
    "Evaluation",
    "FuserConfig",
    "GateOptions",
    "Kind",
    "Layout",
    "Lora",
    "Loss",
    "Optimizer",
    "Parallel",
    "Part",
    "Profile",
    "Report",
    "Sizes",
    "Specialist",
    "Stage",
    "Stage2",
    "Toy",
    "TrainedPart",
    "check_parts",
    "default_config_text",
    "dump_config",
    "in_words",
    "load_config",
]
