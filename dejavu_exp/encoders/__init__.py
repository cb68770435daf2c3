"""Vision encoders: light specs that check themselves, and `load()` for the network with its own transform."""

from dejavu_exp.encoders.base import Encoder, LoadedEncoder
from dejavu_exp.encoders.checkpoints import CheckpointEncoder
from dejavu_exp.encoders.open_clip_models import OpenClipEncoder, ZeroShotEncoder
from dejavu_exp.encoders.timm_models import TimmEncoder

__all__ = ["CheckpointEncoder", "Encoder", "LoadedEncoder", "OpenClipEncoder", "TimmEncoder", "ZeroShotEncoder"]
