"""Training of what the instrument needs and cannot be had ready-made."""

from dejavu_exp.training.encoder import TrainedEncoder, TrainingInputs, curves, load_if_ready, training_views
from dejavu_exp.training.fit import Job, TrainingSettings
from dejavu_exp.training.recipe import Optimizer, Recipe, Schedule
from dejavu_exp.training.supervised import Supervised

__all__ = [
    "Job",
    "Optimizer",
    "Recipe",
    "Schedule",
    "Supervised",
    "TrainedEncoder",
    "TrainingInputs",
    "TrainingSettings",
    "curves",
    "load_if_ready",
    "training_views",
]
