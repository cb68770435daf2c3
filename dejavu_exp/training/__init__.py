"""Training of what the instrument needs and cannot be had ready-made."""

from dejavu_exp.training.clip import ClipNetwork, ClipRecipe, TrainedClip
from dejavu_exp.training.encoder import (
    TrainedEncoder,
    TrainedHere,
    TrainingInputs,
    curves,
    load_if_ready,
    training_views,
)
from dejavu_exp.training.fit import Job, TrainingSettings
from dejavu_exp.training.recipe import Optimizer, Recipe, Schedule
from dejavu_exp.training.supervised import Supervised

__all__ = [
    "ClipNetwork",
    "ClipRecipe",
    "Job",
    "Optimizer",
    "Recipe",
    "Schedule",
    "Supervised",
    "TrainedClip",
    "TrainedEncoder",
    "TrainedHere",
    "TrainingInputs",
    "TrainingSettings",
    "curves",
    "load_if_ready",
    "training_views",
]
