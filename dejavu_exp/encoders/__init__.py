"""Encoders of images and texts: light specs that check themselves, and `load()` for a network with its transform."""

from dejavu_exp.encoders.base import Encoder, LoadedEncoder
from dejavu_exp.encoders.checkpoints import CheckpointEncoder
from dejavu_exp.encoders.detectors import DetectorEncoder
from dejavu_exp.encoders.functions import CallableEncoder
from dejavu_exp.encoders.huggingface import HuggingFaceEncoder
from dejavu_exp.encoders.open_clip_models import OpenClipEncoder, ZeroShotEncoder
from dejavu_exp.encoders.preprocess import Preprocess
from dejavu_exp.encoders.text_encoders import CharNgramEncoder, SentenceEncoder
from dejavu_exp.encoders.timm_models import TimmEncoder
from dejavu_exp.encoders.torchscript import TorchScriptEncoder

__all__ = [
    "CallableEncoder",
    "CharNgramEncoder",
    "CheckpointEncoder",
    "DetectorEncoder",
    "Encoder",
    "HuggingFaceEncoder",
    "LoadedEncoder",
    "OpenClipEncoder",
    "Preprocess",
    "SentenceEncoder",
    "TimmEncoder",
    "TorchScriptEncoder",
    "ZeroShotEncoder",
]
