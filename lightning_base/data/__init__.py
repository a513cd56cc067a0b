"""Corpora, their preparation, and the order in which a run consumes them.

The names are imported on first use: `import lightning_base.data` alone loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_base.data.corpus import Corpus, CorpusError, Document, TokenDocument
    from lightning_base.data.datamodule import TextDataModule
    from lightning_base.data.evaluation import EvaluationSampler
    from lightning_base.data.huggingface import HuggingFace
    from lightning_base.data.loader import TokenLoader, TrainingLoader
    from lightning_base.data.order import GlobalBatchSampler, check_batch
    from lightning_base.data.preparation import described, prepare, prepare_for_run
    from lightning_base.data.prepared import PreparedCorpus, TokenSplit
    from lightning_base.data.python_stdlib import PythonStandardLibrary
    from lightning_base.data.sequences import SequenceDataset
    from lightning_base.data.text import TextFiles
    from lightning_base.data.tokens import TokenFiles
    from lightning_base.data.vocabulary import settled

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
    "described": "preparation",
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

__all__ = [
    "Corpus",
    "CorpusError",
    "Document",
    "EvaluationSampler",
    "GlobalBatchSampler",
    "HuggingFace",
    "PreparedCorpus",
    "PythonStandardLibrary",
    "SequenceDataset",
    "TextDataModule",
    "TextFiles",
    "TokenDocument",
    "TokenFiles",
    "TokenLoader",
    "TokenSplit",
    "TrainingLoader",
    "check_batch",
    "described",
    "prepare",
    "prepare_for_run",
    "settled",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
