"""Training of what the instrument needs and cannot be had ready-made."""

from dejavu_exp.training.encoder import TrainedEncoder, TrainingInputs, load_if_ready
from dejavu_exp.training.supervised import Supervised

__all__ = ["Supervised", "TrainedEncoder", "TrainingInputs", "load_if_ready"]
