"""Training exit heads on text that the base model writes itself.

`calibrate`, `measure` and the rest are imported from their modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
    from .config import Recipe, TrainConfig
    from .generate import Sampling, write_text
    from .measure import inference_projection, simulate_chain, training_projection
    from .run import Base, load_base, train
    from .stop import Stopped
    from .trainer import HeadTrainer

__all__ = [
    "Base",
    "Checkpoint",
    "HeadTrainer",
    "Recipe",
    "Sampling",
    "Stopped",
    "TrainConfig",
    "inference_projection",
    "load_base",
    "newest_checkpoint",
    "save_checkpoint",
    "simulate_chain",
    "train",
    "training_projection",
    "write_text",
]

# Imported at first use: `skipstone train --help` needs no torch.
_PLACES = {
    "checkpoint": ("Checkpoint", "newest_checkpoint", "save_checkpoint"),
    "config": ("Recipe", "TrainConfig"),
    "generate": ("Sampling", "write_text"),
    "measure": ("inference_projection", "simulate_chain", "training_projection"),
    "run": ("Base", "load_base", "train"),
    "stop": ("Stopped",),
    "trainer": ("HeadTrainer",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
