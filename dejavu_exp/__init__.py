"""Measure how much of its training data a vision encoder remembers: déjà vu memorization, with cheap references."""

__version__ = "0.1.0"
