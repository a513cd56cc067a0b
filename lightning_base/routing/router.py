"""Router: what every routing algorithm is to the rest of the code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Int64
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan


class Router(nn.Module):
    """Decides which tokens go to which experts.

    To add a routing algorithm, subclass this in a file of its own in ``routing/`` and name the class in one file in
    ``conf/router/``. Keyword arguments of ``__init__`` are the options a user may set there; the sparse layer adds
    ``width``. Raise ``ValueError`` with one sentence for a value that cannot work. Parameters are drawn in
    ``reset_parameters`` with torch's global generator: ``__init__`` calls it last, so that a router is ready for use in
    any model; the harness's own model calls it once more, seeded for each module by name.

    Attributes:
        num_experts: E.
        top_k: experts a token asks for.
        asks_for_fewer: True if some tokens may ask for fewer than ``top_k`` experts.
        causal: False if a token's expert, weight or drop may depend on later tokens of its group while training.
        straight_through: True if the gradient of a gate is not that of its value, as of a straight-through estimator.
        evaluation_modes: the ways this router can route in evaluation, and for each the same question: False if later
            tokens may matter. The first is the default. Options that decide either set it on the instance.
        loss_coefficients: the paper's coefficient of each auxiliary loss the router returns.
        refused_options: options that other routers have and this one cannot have, each with the reason.
        layer: the name of the layer this router works for, once it is part of a model.
        any_text: False for a router that knows what to do with the text of its run alone, so that it cannot be probed.
        rehearsal: True during a pass that belongs to no step, such as the one in which FLOPs are counted.
    """

    asks_for_fewer: bool = False
    causal: bool = True
    straight_through: bool = False
    loss_coefficients: ClassVar[dict[str, float]] = {}
    evaluation_modes: Mapping[str, bool] = MappingProxyType({"default": True})
    refused_options: ClassVar[dict[str, str]] = {}
    layer: str = ""
    any_text: ClassVar[bool] = True
    rehearsal: bool = False

    def __init__(self, *, num_experts: int, top_k: int = 1) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"router.num_experts={num_experts}: a layer needs at least 1 expert")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"router.top_k={top_k} with router.num_experts={num_experts}: "
                f"a token can go to between 1 and {num_experts} experts"
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.evaluation_mode = self.default_evaluation_mode

    @property
    def default_evaluation_mode(self) -> str:
        return next(iter(self.evaluation_modes))

    @property
    def causal_in_evaluation(self) -> bool:
        """Whether evaluation in the default mode never looks at later tokens."""
        return self.evaluation_modes[self.default_evaluation_mode]

    @property
    def needs_token_ids(self) -> bool:
        """Whether routing, as the router is set now, depends on token ids; a model may be unable to give them."""
        return False

    @property
    def needs_sequences(self) -> bool:
        """Whether a loss looks at each sequence by itself, so that routing groups have to hold whole sequences."""
        return False

    def check_group(self, tokens: int) -> None:
        """Raises ValueError if a full training group of ``tokens`` tokens cannot be routed as promised."""
        if self.num_experts > tokens:
            raise ValueError(
                f"router.num_experts={self.num_experts} exceeds the {tokens} tokens of a routing group "
                "(data.routing_group x data.sequence_length): use fewer experts or a larger group"
            )

    def check_run(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError if the run of this whole configuration is not one this router can work in."""

    def prepare(self, token_counts: Int64[Tensor, " V"]) -> None:
        """Told once, before training, how often each token occurs in the training text; most need not know."""

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        """What a training forward pass adds to the statistics of its optimizer step.

        The module sums them over micro batches and ranks and hands the sums to ``end_step``, so that whatever a router
        remembers is the same for any world size and accumulation. Recomputation cannot count a pass twice.
        """
        return {}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        """Takes the summed statistics of the optimizer step that ends; state belongs in buffers."""

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        """Routes T tokens.

        Args:
            tokens: [T, D] float, without padding.
            token_ids: [T] int64, their ids in the vocabulary.
            groups: the routing groups, ``groups.num_tokens == T``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")
