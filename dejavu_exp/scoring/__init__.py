"""Scoring variants: which rows count, which decision, which memorization score; the figures and their intervals."""

from dejavu_exp.scoring.labels import LabelInference
from dejavu_exp.scoring.objects import ObjectInference

__all__ = ["LabelInference", "ObjectInference"]
