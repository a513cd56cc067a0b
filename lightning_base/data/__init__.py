"""Corpora, their preparation, and the order in which a run consumes them.

The names are imported on first use: `import lightning_base.data` alone loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Corpus": "corpus",
    "CorpusError": "corpus",
    "Document": "corpus",
    "TokenDocument": "corpus",
    "PythonStandardLibrary": "python_stdlib",
    "TextFiles": "text",
    "TokenFiles": "tokens",
    "HuggingFace": "huggingface",
    "prepare": "preparation",
    "prepare_for_run": "preparation",
    "settled": "vocabulary",
    "PreparedCorpus": "prepared",
    "TokenSplit": "prepared",
    "SequenceDataset": "sequences",
    "GlobalBatchSampler": "order",
    "check_batch": "order",
    "EvaluationSampler": "evaluation",
    "TokenLoader": "loader",
    "TrainingLoader": "loader",
    "TextDataModule": "datamodule",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
