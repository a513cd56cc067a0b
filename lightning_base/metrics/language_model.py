"""LanguageModelLoss: loss, perplexity and bits per byte over a whole pass."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric


class LanguageModelLoss(Metric):
    """Sums the negative log-likelihood of the targets; every target counts once, however batches and ranks are cut.

    ``compute`` gives ``loss`` (nats per token), ``perplexity`` and, if targets stand for any bytes, ``bits_per_byte``
    (which does not depend on the tokenizer).

    >>> metric = LanguageModelLoss()
    >>> metric.update(torch.tensor([2.0, 4.0]), torch.tensor([3, 1]))
    >>> metric.compute()["loss"].item()
    3.0
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Float[Tensor, " N"], target_bytes: Int64[Tensor, " N"]) -> None:
        """Adds the negative log-likelihood of N targets, in nats, and the bytes each stands for; all 0 if unknown."""
        self.nll += nll.double().sum()
        self.targets += nll.numel()
        self.bytes += target_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        loss = self.nll / self.targets
        values = {"loss": loss, "perplexity": loss.exp()}
        if bool(self.bytes):
            values["bits_per_byte"] = self.nll / math.log(2) / self.bytes
        return values
