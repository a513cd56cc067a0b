"""Metrics over expert counts and over tokens, summed across ranks."""

from lightning_base.metrics.expert_load import ExpertLoad
from lightning_base.metrics.language_model import LanguageModelLoss

__all__ = ["ExpertLoad", "LanguageModelLoss"]
