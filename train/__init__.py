"""Training exit heads on text that the base model writes itself."""

from .calibrate import calibrate
from .checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from .generate import Sampling, write_text
from .measure import inference_projection, measure, simulate_chain, training_projection
from .run import Base, TrainConfig, load_base, train
from .trainer import HeadTrainer, Recipe

__all__ = [
    "Base",
    "Checkpoint",
    "HeadTrainer",
    "Recipe",
    "Sampling",
    "TrainConfig",
    "calibrate",
    "inference_projection",
    "load_base",
    "measure",
    "newest_checkpoint",
    "save_checkpoint",
    "simulate_chain",
    "train",
    "training_projection",
    "write_text",
]
