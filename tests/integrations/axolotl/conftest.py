"""What axolotl imports and these runs do not need."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

if importlib.util.find_spec("axolotl") is not None:
    sys.modules["wandb"] = ModuleType("wandb")  # logs to a server
    sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
