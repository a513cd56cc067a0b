"""The sparse layer, whole.

Shapes: B sequences, L positions, D width, T tokens that are not padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.moe.copies import FeedForwardExperts
from lightning_base.moe.dispatch import Dispatch, Dispatcher, ShardedDispatcher
from lightning_base.moe.exchange import Exchange
from lightning_base.moe.experts import Experts
from lightning_base.moe.shuffle import Shuffle
from lightning_base.moe.stopwatch import Stopwatch
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.router import Router


class SparseLayer(nn.Module):
    """h + sum over the token's experts of weight * (f_e(h) - h); BASE as released, with a sigmoid gate:
    weight * f(h) + (1 - weight) * h. Eq. 1 of its paper is that with f written as what the expert adds.

    Padding is taken out before routing: it never counts and never takes a slot, and passes through unchanged.

    Args:
        router: decides.
        experts: compute.
        routing_group: sequences that are routed together.
        router_norm: the router sees LayerNorm(h), without gain, instead of h.
        residual: False leaves h out and gives only what the experts add, for a block that adds h by itself.
        shuffle: deals the tokens of a training step out to its routing groups; None: a group is whole sequences.

    Attributes:
        stopwatch: takes the time of each phase, if whoever wants to know sets one.
        exchange: through which tokens go to experts on other ranks; None where this rank holds all of them.
    """

    stopwatch: Stopwatch | None = None
    exchange: Exchange | None = None

    def __init__(
        self,
        router: Router,
        experts: Experts | FeedForwardExperts,
        *,
        routing_group: int,
        router_norm: bool = True,
        residual: bool = True,
        shuffle: Shuffle | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router has {router.num_experts} experts, the layer {experts.num_experts}")
        if routing_group < 1:
            raise ValueError(f"routing_group={routing_group}: a routing group is at least 1 sequence")
        self.router = router
        self.experts = experts
        self.routing_group = routing_group
        self.router_norm = router_norm
        self.residual = residual
        self.shuffle = shuffle
        self._dispatcher: Callable[[RoutingPlan], Dispatch] = Dispatcher

    def shard(self, exchange: Exchange, *, same_sizes: bool = False) -> None:
        """Keeps this rank's share of the experts, and lets tokens find the others.

        Args:
            exchange: between the ranks that share the experts.
            same_sizes: every rank of them always has routing groups of the same sizes in training, that is: no padding.

        Raises:
            ValueError: the experts cannot be shared equally.
        """
        self.experts.keep(exchange.rank, exchange.size)
        self.exchange = exchange
        # Evaluation fills up its last batch with padding, of which ranks have more and less.
        self._dispatcher = lambda plan: ShardedDispatcher(plan, exchange, same_sizes=same_sizes and self.training)

    def forward(
        self,
        hidden: Float[Tensor, "*B L D"],
        token_ids: Int64[Tensor, "*B L"] | None = None,
        valid: Bool[Tensor, "*B L"] | None = None,
    ) -> tuple[Float[Tensor, "*B L D"], RoutingPlan]:
        """Hidden states after the layer, and the plan that was carried out.

        Args:
            hidden: [B, L, D], or [T, D] for the tokens of a single sequence.
            token_ids: [B, L], or [T]; only routers with ``needs_token_ids`` look at them.
            valid: [B, L], or [T], False for padding; None if there is none.

        Raises:
            ValueError: no ``token_ids`` for a router that needs them.
        """
        if hidden.ndim == 2:
            alone, plan = self.forward(
                hidden[None],
                None if token_ids is None else token_ids[None],
                None if valid is None else valid[None],
            )
            return alone[0], plan
        if token_ids is None:
            if self.router.needs_token_ids:
                raise ValueError(
                    f"{type(self.router).__name__} routes by token ids: give them to the layer, or let "
                    "read_inputs(model) find them for a DropIn"
                )
            token_ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        flat_TD, ids_T = hidden.flatten(0, 1), token_ids.flatten()
        groups = self._groups(hidden.shape[0], hidden.shape[1], valid)
        where = None if valid is None else valid.flatten().nonzero().squeeze(1)
        tokens_TD = flat_TD if where is None else flat_TD[where]
        ids_T = ids_T if where is None else ids_T[where]
        watch = self.stopwatch
        if watch is not None:
            watch.start()
        deal = None if self.shuffle is None else self.shuffle.deal(groups, hidden.device)
        if deal is not None:
            tokens_TD = deal.shuffle(tokens_TD)
            ids_T = deal.shuffle(ids_T) if self.router.needs_token_ids else ids_T
            if watch is not None:
                watch.lap("dispatch")

        seen_TD = F.layer_norm(tokens_TD, tokens_TD.shape[-1:]) if self.router_norm else tokens_TD
        if watch is not None:
            watch.start()
        plan = self.router(seen_TD, ids_T, groups)
        if not isinstance(plan, RoutingPlan):
            raise TypeError(f"{type(self.router).__name__}.forward gave a {type(plan).__name__}, and not a RoutingPlan")
        if watch is not None:
            watch.lap("router")
        dispatcher = self._dispatcher(plan)
        # Experts of one sublayer see the same LayerNorm as the router, which need not be taken twice. Somebody else's
        # module in their place is given the tokens themselves.
        shared_norm = self.router_norm and type(self.experts) is Experts and self.experts.sublayers == 1
        dispatched_AD = dispatcher.dispatch(seen_TD if shared_norm else tokens_TD)
        if watch is not None:
            watch.lap("dispatch")
        options = {"normalized": True} if shared_norm else {}
        outputs_AD = self.experts(dispatched_AD, dispatcher.counts, **options)
        if watch is not None:
            watch.lap("experts")
        added_TD = dispatcher.combine(outputs_AD).to(flat_TD.dtype)
        if deal is not None:
            added_TD = deal.unshuffle(added_TD)
        if watch is not None:
            watch.lap("combine")
        if where is not None:
            added_TD = torch.zeros_like(flat_TD).index_copy(0, where, added_TD)
        result_TD = flat_TD + added_TD if self.residual else added_TD
        return result_TD.view_as(hidden), dispatcher.plan

    def _groups(self, sequences: int, length: int, valid: Tensor | None) -> RoutingGroups:
        per_sequence = [length] * sequences if valid is None else valid.sum(1).tolist()
        step = self.routing_group
        sizes = tuple(sum(per_sequence[i : i + step]) for i in range(0, sequences, step))
        return RoutingGroups(sizes, tuple(per_sequence))


def _dispatch_held(plan: RoutingPlan, held: range) -> Dispatch:
    return Dispatcher(plan.of_experts(held))


@contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Inside, a rank can run ``model`` by itself: experts of other ranks add nothing to its tokens."""
    sharded = [module for module in model.modules() if isinstance(module, SparseLayer) and module.exchange is not None]
    before = [layer._dispatcher for layer in sharded]
    try:
        for layer in sharded:
            layer._dispatcher = partial(_dispatch_held, held=layer.experts.held)
        yield
    finally:
        for layer, dispatcher in zip(sharded, before, strict=True):
            layer._dispatcher = dispatcher


def set_evaluation_mode(model: nn.Module, mode: str | None) -> None:
    """Sets how the routers in ``model`` that know ``mode`` route in evaluation; None restores the default."""
    for module in model.modules():
        if isinstance(module, Router):
            if mode is not None and mode in module.evaluation_modes:
                module.evaluation_mode = mode
            else:
                module.evaluation_mode = module.default_evaluation_mode
