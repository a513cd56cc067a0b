"""What ``LanguageModel`` trains: a language model with sparse layers, ours or somebody else's.

Shapes: B sequences, L positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from lightning_base.moe.layer import SparseLayer
from lightning_base.routing.plan import RoutingPlan


@dataclass(frozen=True)
class ModelOutput:
    """Logits [B, L, V] and one RoutingPlan per sparse layer, by the layer's name."""

    logits: Tensor
    plans: dict[str, RoutingPlan]


class SparseModel(nn.Module):
    """The base of the models that can be trained here.

    Attributes:
        blocks: the repeated parts by name, in their order; each is small enough to be gathered as a whole.
        architecture: what identifies the model beyond its configuration and its weights, for the certificate.
        packages: of others, that compute it.
    """

    blocks: nn.ModuleDict | dict[str, nn.Module]
    architecture: Mapping[str, Any] | None = None
    packages: tuple[str, ...] = ()

    @property
    def sparse_layers(self) -> dict[str, SparseLayer]:
        """The sparse layers by name, from the first to the last."""
        raise NotImplementedError

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The parts whose output is a hidden state, by name, in the order in which they have it ready.

        Under the name of every sparse layer there is one.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int64[Tensor, "B L"],
        valid: Bool[Tensor, "B L"] | None = None,
        document: Int64[Tensor, "B L"] | None = None,
    ) -> ModelOutput:
        """Next-token logits.

        Args:
            input_ids: [B, L].
            valid: [B, L], False for padding; None if there is none.
            document: [B, L]; if given, a position attends only within its own document.
        """
        raise NotImplementedError
