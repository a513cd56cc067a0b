"""Says whether a model has learnt the few batches that it was shown over and over: ``debug=overfit``."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.data import TextDataModule
from lightning_base.module import IGNORED


class LearntByHeart(pl.Callback):
    """Prints the last training loss beside what the frequencies of the batches' tokens alone would give."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here the progress bar has ended.
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule)
        sequences, sampler = data.training_sequences(), data.train_dataloader().batch_sampler
        steps = range(data.distinct_batches or 0)
        targets = torch.cat([sequences[int(i)]["targets"] for step in steps for i in sampler.global_batch_at(step)])
        loss, known = float(trainer.callback_metrics["train/loss"]), unigram_entropy(targets)
        repeated = "batch" if len(steps) == 1 else f"{len(steps)} batches"
        print(
            f"training loss {loss:.3f} after {trainer.global_step} steps over the same {repeated}; "
            f"token frequencies alone would give {known:.3f}"
            + ("" if loss < known / 2 else ": the model has not learnt it by heart")
        )


def unigram_entropy(targets: Tensor) -> float:
    """Entropy [nats] of the frequencies of the targets that count.

    >>> round(unigram_entropy(torch.tensor([3, 3, 5, 5])), 4)  # a fair coin: log 2
    0.6931
    """
    share = torch.bincount(targets[targets != IGNORED]).double() / int((targets != IGNORED).sum())
    return float(-torch.special.xlogy(share, share).sum())
