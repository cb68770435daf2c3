"""Encoders of images and texts: light specs that check themselves, and `load()` for a network with its transform."""

from dejavu_exp.encoders.base import Encoder, LoadedEncoder
from dejavu_exp.encoders.checkpoints import CheckpointEncoder
from dejavu_exp.encoders.detectors import DetectorEncoder
from dejavu_exp.encoders.open_clip_models import OpenClipEncoder, ZeroShotEncoder
from dejavu_exp.encoders.text_encoders import CharNgramEncoder, SentenceEncoder
from dejavu_exp.encoders.timm_models import TimmEncoder

__all__ = [
    "CharNgramEncoder",
    "CheckpointEncoder",
    "DetectorEncoder",
    "Encoder",
    "LoadedEncoder",
    "OpenClipEncoder",
    "SentenceEncoder",
    "TimmEncoder",
    "ZeroShotEncoder",
]
