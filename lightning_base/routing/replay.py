"""Replay: the plans of another run, looked up.

Shapes: A assignments, T tokens, D width, E experts, G routing groups.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.recording import GroupPlan, Recording, digest_groups
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision

Weight = Literal["recorded", "learned", "one"]
# What decides which sequences a step consists of, when there is an evaluation, and which layers there are.
MUST_MATCH = (
    "seed",
    "data.corpus",
    "data.vocab_size",
    "data.tokenizer",
    "data.end_of_text",
    "data.sequence_length",
    "data.global_batch",
    "data.routing_group",
    "data.packing",
    "data.validation_fraction",
    "data.validation_sequences",
    "model.depth",
    "model.placement",
    "model.sparse_layers",
    "model.library",
    "model.config",
    "model.layers",
    "trainer.max_steps",
    "trainer.validate_every_n_steps",
)


class Replay(Router):
    """Sends every token where another run sent it at the same step, so that two effects can be told apart: that of
    which expert a token goes to, and that of the gradient which the source's gate sends back while it learns.

    A group is found by its token ids: seed, data and steps have to be the source's; ranks and accumulation need not.
    Replaying BASE with ``weight="learned"`` is BASE itself, since the centroids start and learn as its own do; the same
    plans with ``"recorded"`` weights are constants, through which no gradient flows, neither to a router nor to the
    layers below. No auxiliary loss is replayed.

    Args:
        source: the directory of a finished run with ``trainer.record_plans=true``.
        width: D.
        num_experts: E; the source's if not given.
        top_k: experts a token asks for; the source's if not given.
        weight: ``recorded``, the gates of the source; ``learned``, sigmoid(h_t . w_e) with centroids of its own, as in
            BASE (eq. 1); ``one``, no gate at all.
    """

    any_text = False
    step: Tensor

    def __init__(
        self,
        *,
        source: str,
        width: int,
        num_experts: int | None = None,
        top_k: int | None = None,
        weight: str = "recorded",
    ) -> None:
        if weight not in get_args(Weight):
            raise ValueError(f"router.weight={weight}: choose one of {', '.join(get_args(Weight))}")
        recording = Recording(Path(source))
        facts = recording.facts
        for key, given in (("num_experts", num_experts), ("top_k", top_k)):
            if given is not None and given != facts[key]:
                raise ValueError(
                    f"router.{key}={given} is not the {facts[key]} of router.source={source}: leave it out"
                )
        super().__init__(num_experts=int(facts["num_experts"]), top_k=int(facts["top_k"]))
        self.recording = recording
        self.weight = weight
        self.asks_for_fewer = bool(facts["asks_for_fewer"])
        self.causal = bool(facts["causal"])
        self.evaluation_modes = dict(facts["evaluation_modes"])
        self.evaluation_mode = self.default_evaluation_mode
        self.centroids = nn.Parameter(torch.empty(self.num_experts, width)) if weight == "learned" else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        if self.centroids is not None:
            nn.init.orthogonal_(self.centroids, gain=0.1)

    def check_run(self, config: Mapping[str, Any]) -> None:
        if _value(config, "model.shuffle_tokens"):
            raise ValueError(
                "router=replay with model.shuffle_tokens: a plan is found by the tokens of a whole routing group, "
                "which the shuffle deals out; set model.shuffle_tokens=false"
            )
        for key in MUST_MATCH:
            here, there = _value(config, key), _value(self.recording.config, key)
            if here != there:
                raise ValueError(f"{key}={here} is not the {there} of router.source={self.recording.source}: set it so")

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.step += 1

    def stages(self) -> list[str]:
        """Where the source has recorded passes of the kind this one is."""
        if self.training:
            return ["train"]
        if self.evaluation_mode == self.default_evaluation_mode:
            return ["validation", "final"]
        return [f"final_{self.evaluation_mode}"]

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        found = self._rehearsed(groups) if self.rehearsal else self._look_up(token_ids, groups)
        device, plans = tokens.device, list(zip(groups.starts(), found, strict=True))
        token_index = _joined([torch.from_numpy(plan.token_index) + start for start, plan in plans], device)
        expert_index = _joined([torch.from_numpy(plan.expert_index) for _, plan in plans], device)
        aux: dict[str, Tensor] = {}
        slots = [plan.capacity for _, plan in plans if plan.capacity is not None]
        demand = [torch.from_numpy(plan.demand) for _, plan in plans]
        if self.centroids is not None:
            with torch.autocast(device.type, enabled=False):
                scores_TE = nn.functional.linear(full_precision(tokens), full_precision(self.centroids))
            weight = torch.sigmoid(scores_TE[token_index, expert_index])
            aux["gates"] = weight.detach()
        elif self.weight == "one":
            weight = torch.ones(len(token_index), device=device)
        else:
            weight = torch.cat([torch.zeros(0), *(torch.from_numpy(plan.weight) for _, plan in plans)]).to(device)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=torch.stack(demand).to(device) if demand else token_index.new_zeros(0, self.num_experts),
            groups=groups,
            top_k=self.top_k,
            capacity=torch.tensor(slots, device=device) if slots else None,
            aux=aux,
        )

    # Files and hashes, which torch.compile would try to trace.
    @torch.compiler.disable
    def _look_up(self, token_ids: Tensor, groups: RoutingGroups) -> list[GroupPlan]:
        stages, step = self.stages(), int(self.step)
        digests = digest_groups(token_ids, groups)
        found = [
            self.recording.group(stages, step, self.layer, digest) if size else None
            for digest, size in zip(digests, groups.sizes, strict=True)
        ]
        limited = any(plan is not None and plan.capacity is not None for plan in found)
        # A group without tokens is nobody's: padding at the end of an evaluation, which depends on the ranks.
        return [_nothing(self.num_experts, limited) if plan is None else plan for plan in found]

    def _rehearsed(self, groups: RoutingGroups) -> list[GroupPlan]:
        """As many assignments as the source makes, to experts in turn."""
        plans = []
        for size in groups.sizes:
            expert = torch.arange(size * self.top_k) % self.num_experts
            token = torch.arange(size).repeat_interleave(self.top_k)
            demand = torch.bincount(expert, minlength=self.num_experts)
            plans.append(GroupPlan(token.numpy(), expert.numpy(), torch.ones(len(token)).numpy(), demand.numpy(), None))
        return plans


def _nothing(num_experts: int, limited: bool) -> GroupPlan:
    none = torch.zeros(0, dtype=torch.int64).numpy()
    demand = torch.zeros(num_experts, dtype=torch.int64).numpy()
    return GroupPlan(none, none, torch.zeros(0).numpy(), demand, 0 if limited else None)


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(device)


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
