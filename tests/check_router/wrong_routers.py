"""A router that keeps every promise, and for each promise one that breaks it.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_base.routing import Router, RoutingGroups, RoutingPlan
from lightning_base.routing.losses import balancing_loss
from lightning_base.routing.noise import draw_key, uniform_noise
from lightning_base.routing.plan import StepLoss, count_by_group
from lightning_base.routing.selection import full_precision


class Right(Router):
    """The expert of the largest probability with some noise and a bias that follows the load; the gate is the
    probability."""

    loss_coefficients: ClassVar[dict[str, float]] = {"load_balancing_loss": 0.01}

    def __init__(self, *, num_experts: int, width: int) -> None:
        super().__init__(num_experts=num_experts)
        self.gate = nn.Parameter(torch.empty(num_experts, width))
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float64))
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate, std=0.1)
        self.key.copy_(draw_key())

    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(full_precision(tokens), full_precision(self.gate)).softmax(-1)

    def noise(self, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return uniform_noise(token_ids, groups, self.num_experts, key=int(self.key), step=int(self.step))

    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return (probabilities_TE.detach() + 0.1 * self.noise(token_ids, groups) + self.bias).argmax(-1)

    def weigh(self, chosen_T: Tensor) -> Tensor:
        return chosen_T

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        probabilities_TE = self.probabilities(tokens, groups)
        expert_index = self.choose(probabilities_TE, token_ids, groups)
        token_index = torch.arange(len(tokens))
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=self.weigh(probabilities_TE.gather(1, expert_index[:, None])[:, 0]),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            losses=balancing_loss(probabilities_TE, token_index, expert_index, groups).losses,
        )

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"demand": plan.demand}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        demand_E = sums["demand"].double()
        self.bias += 0.01 * (demand_E.mean() - demand_E).sign()
        self.step += 1


class LeavesMemory(Right):
    def __init__(self, *, num_experts: int, width: int) -> None:
        super().__init__(num_experts=num_experts, width=width)
        self.gate = nn.Parameter(torch.empty(num_experts, width))


class KnowsEightExperts(Right):
    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return super().choose(probabilities_TE, token_ids, groups) % 7 + 1


class TakesAnything(Right):
    def __init__(self, *, num_experts: int, width: int, temperature: float = 1.0) -> None:
        super().__init__(num_experts=num_experts, width=width)


class TakesAnythingByPosition(Right):
    def __init__(self, num_experts: int, width: int, temperature: float = 1.0) -> None:
        super().__init__(num_experts=num_experts, width=width)


class TakesAnyWord(Right):
    def __init__(self, *, num_experts: int, width: int, scores: str = "softmax") -> None:
        super().__init__(num_experts=num_experts, width=width)


class HasASeedOfItsOwn(Right):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate, std=0.1, generator=torch.Generator().manual_seed(0))


class DrawsABufferOnce(Right):
    def __init__(self, *, num_experts: int, width: int) -> None:
        super().__init__(num_experts=num_experts, width=width)
        self.register_buffer("table", torch.randn(num_experts))


class CountsFromOne(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, expert_index=plan.expert_index + 1)


class ShowsLogits(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, aux={"probabilities": self.probabilities(tokens, groups).log().detach()})


class CountsSequencesAsTokens(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        part = StepLoss(plan.demand, self.probabilities(tokens, groups).sum(0), len(groups.sizes))
        return replace(plan, losses={}, step_losses={"load_balancing_loss": part})


class DividesByTokens(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        loss = self.probabilities(tokens, groups).square().sum() / len(tokens)
        return replace(super().forward(tokens, token_ids, groups), losses={"load_balancing_loss": loss})


class AveragesOverEmptyGroups(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        share = groups.held / max(len(groups.sizes), 1)
        return replace(plan, losses={name: loss * share for name, loss in plan.losses.items()})


class DrawsFromTorch(Right):
    def noise(self, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return torch.rand(len(token_ids), self.num_experts)


class DrawsForItsLoss(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, losses={name: loss * (1 + torch.rand(())) for name, loss in plan.losses.items()})


class SeesAllGroups(Right):
    causal = False
    evaluation_modes: Mapping[str, bool] = MappingProxyType({"default": False})

    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        return super().probabilities(tokens - tokens.mean(0), groups)


class ReadsIdsInSecret(Right):
    @property
    def needs_token_ids(self) -> bool:
        return False


class ReadsSequencesInSecret(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        balance = balancing_loss(
            self.probabilities(tokens, groups), plan.token_index, plan.expert_index, groups, "sequence"
        )
        return replace(plan, losses=balance.losses)


class Peeks(Right):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        means = [part.mean(0, keepdim=True).expand_as(part) for part in groups.split(tokens)]
        return super().probabilities(tokens - torch.cat([tokens[:0], *means]), groups)


class PeeksOnceItHasLearnt(Right):
    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        means = [part.mean(0, keepdim=True).expand_as(part) for part in groups.split(probabilities_TE)]
        later_TE = torch.cat([probabilities_TE[:0], *means]) * self.bias.norm() * 1e3
        return super().choose(probabilities_TE - later_TE, token_ids, groups)


class TooModest(Right):
    causal = False


class DropsInSilence(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        kept = (plan.expert_index != 3).nonzero()[:, 0]
        return replace(
            plan,
            token_index=plan.token_index[kept],
            expert_index=plan.expert_index[kept],
            weight=plan.weight[kept],
        )


class ClaimsEqualLoads(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        return replace(super().forward(tokens, token_ids, groups), equal_loads=True)


class ClaimsEqualLoadsOfAnyNumber(Right):
    """In turn, which is equal where the tokens of a group are a multiple of the experts."""

    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return torch.cat([torch.arange(size) % self.num_experts for size in (0, *groups.sizes)])

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, equal_loads=len(tokens) % self.num_experts == 0)


class HandsOnMeans(Right):
    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"demand": plan.demand / max(len(plan.groups.sizes), 1)}


class AveragesNothing(Right):
    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"demand": plan.demand, "confidence": plan.weight.mean() * len(plan.weight)}


class CountsPadding(Right):
    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        sequences = plan.groups.sequences or plan.groups.sizes
        padded = len(sequences) * max(sequences, default=0) - plan.num_tokens
        return {"demand": plan.demand + padded}


class MakesRoomForPadding(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        sequences = groups.sequences or groups.sizes
        slots = [len(sequences) * max(sequences) for _ in groups.sizes]  # never fewer than tokens
        return replace(plan, capacity=torch.tensor(slots, dtype=torch.int64))


class Detaches(Right):
    def weigh(self, chosen_T: Tensor) -> Tensor:
        return chosen_T.detach()


class DetachesHalf(Right):
    def weigh(self, chosen_T: Tensor) -> Tensor:
        return chosen_T * (1 + chosen_T.detach())


class HasNoSlope(Right):
    def weigh(self, chosen_T: Tensor) -> Tensor:
        return chosen_T + (chosen_T - chosen_T.detach()).clamp(min=0).sqrt()


class StraightThrough(Right):
    """The gate is 1, with the gradient of the probability."""

    straight_through = True

    def weigh(self, chosen_T: Tensor) -> Tensor:
        return 1 + chosen_T - chosen_T.detach()


class StraightThroughToNothing(StraightThrough):
    def weigh(self, chosen_T: Tensor) -> Tensor:
        return super().weigh(chosen_T).detach()


class StraightThroughInSecret(StraightThrough):
    straight_through = False


class ClaimsStraightThrough(Right):
    straight_through = True


class LossOfCounts(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, losses={name: loss.detach() for name, loss in plan.losses.items()})


class LossWithoutSlope(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, losses={n: loss + (loss - loss.detach()).sqrt() for n, loss in plan.losses.items()})


class CountsPasses(Right):
    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"demand": plan.demand, "passes": torch.ones(())}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.bias[0] += sums["passes"]


class KnowsItsRank(Right):
    def noise(self, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return super().noise(token_ids + rank, groups)


class RemembersInForward(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        self.step += 1
        return super().forward(tokens, token_ids, groups)


class RemembersOutsideBuffers(Right):
    steps = 0

    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return (super().choose(probabilities_TE, token_ids, groups) + self.steps) % self.num_experts

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.steps += 1


class RemembersItsLossOutsideBuffers(Right):
    steps = 0

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, losses={name: loss / (1 + self.steps) for name, loss in plan.losses.items()})

    def end_step(self, sums: dict[str, Tensor]) -> None:
        super().end_step(sums)
        self.steps += 1


class AlwaysFloat32(Right):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        return nn.functional.linear(tokens.float(), self.gate.float()).softmax(-1)


class SecretlyFloat32(AlwaysFloat32):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        return super().probabilities(tokens, groups).to(tokens.dtype)


class RoundsItsLoss(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        return replace(plan, losses={name: loss.float().to(tokens.dtype) for name, loss in plan.losses.items()})


class UnderAutocast(Right):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        return nn.functional.linear(tokens, self.gate).softmax(-1)


class LossUnderAutocast(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        plan = super().forward(tokens, token_ids, groups)
        mean_E = self.probabilities(tokens, groups).sum(0) / max(len(tokens), 1)
        return replace(plan, losses={"load_balancing_loss": (mean_E @ mean_E[:, None])[0].to(plan.weight.dtype)})


class RefusesHalfPrecision(Right):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens, self.gate).softmax(-1)


class DividesBySpread(Right):
    def weigh(self, chosen_T: Tensor) -> Tensor:
        return chosen_T / chosen_T.detach().std(correction=0) if len(chosen_T) else chosen_T


class HasNoSlopeAtZero(Right):
    def probabilities(self, tokens: Tensor, groups: RoutingGroups) -> Tensor:
        length_T1 = tokens.square().sum(-1, keepdim=True).sqrt()
        return super().probabilities(tokens / (length_T1 + 1e-6), groups)


class RoundsWhatIsNoNumber(Right):
    def choose(self, probabilities_TE: Tensor, token_ids: Tensor, groups: RoutingGroups) -> Tensor:
        return (probabilities_TE[:, 0].detach() * (self.num_experts - 1)).long()


class LoopsForever(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        while len(tokens):
            pass
        return super().forward(tokens, token_ids, groups)


class EndsEverything(Right):
    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        raise SystemExit(3)
