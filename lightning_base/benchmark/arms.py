"""What is timed: an arm is a function of a batch, with the parameters whose gradients it makes.

Shapes: B sequences, L positions, T = B L tokens, D width, H hidden width of the active experts of a token, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.moe.experts import Experts
from lightning_base.moe.layer import SparseLayer
from lightning_base.routing import BASE, Dense, Router, RoutingPlan, Switch, TopK

EXPERTS_ALONE = "experts, sorted tokens"
ONE_EXPERT = "one expert"
Losses = Sequence[Tensor]
Forward = Callable[[Float[Tensor, "B L D"]], tuple[Float[Tensor, "B L D"], Losses]]


@dataclass(frozen=True)
class Setting:
    """T tokens in sequences of L positions, each of them one routing group; width D, E experts of hidden width 4 D."""

    T: int
    D: int
    E: int
    L: int = 1024  # tokens routed together, as in the default configuration
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def hidden_width(self) -> int:
        """H, of all experts that are active for a token together."""
        return 4 * self.D

    @property
    def flops(self) -> int:
        """Of the matrix products of a forward and backward pass: every token through one expert of width H."""
        return 12 * self.T * self.D * self.hidden_width

    def __str__(self) -> str:
        kind = "" if self.device == "cpu" and self.dtype is torch.float32 else f" {self.device} {self.dtype}"
        return f"{self.T} x {self.D} x {self.E}{kind.replace('torch.', '')}"


@dataclass
class Arm:
    """One way to compute a feed-forward layer.

    Args:
        name: as the table shows it.
        forward: gives the output and the auxiliary losses.
        parameters: whose gradients a pass makes.
        note: how its function differs from a top-1 layer of relu experts.
        layer: our sparse layer, if it is one.
    """

    name: str
    forward: Forward
    parameters: list[nn.Parameter]
    note: str = ""
    layer: SparseLayer | None = None
    _turn: int = field(default=0)

    def run(self, batches: Sequence[Tensor], gradient: Tensor | None) -> None:
        """A pass over the next batch; without ``gradient`` no backward pass."""
        x_BLD = batches[self._turn % len(batches)]
        self._turn += 1
        if gradient is None:
            with torch.no_grad():
                self.forward(x_BLD)
            return
        y_BLD, losses = self.forward(x_BLD)
        torch.autograd.backward([y_BLD, *losses], [gradient, *(loss.new_tensor(0.01) for loss in losses)])
        for parameter in (x_BLD, *self.parameters):
            parameter.grad = None


def references(setting: Setting, experts: Experts) -> list[Arm]:
    """The floor, a dense feed-forward of equal active FLOPs, and our experts without anything around them."""
    w1_EDH, w2_EHD = experts.w1[0], experts.w2[0]
    w1_DH, w2_HD = (nn.Parameter(w[0].detach().clone()) for w in (w1_EDH, w2_EHD))

    def floor(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        x_ECD = x_BLD.view(setting.E, -1, setting.D)  # as if sorted: equal numbers of tokens for every expert
        return torch.bmm(torch.bmm(x_ECD, w1_EDH).relu(), w2_EHD).view_as(x_BLD), ()

    def dense(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        return (x_BLD @ w1_DH).relu() @ w2_HD, ()

    counts_E = torch.full((setting.E,), setting.T // setting.E, device=setting.device)

    def alone(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        return experts(x_BLD.flatten(0, 1), counts_E).view_as(x_BLD), ()

    return [
        Arm("floor", floor, [w1_EDH, w2_EHD]),
        Arm("dense", dense, [w1_DH, w2_HD]),
        Arm(EXPERTS_ALONE, alone, [w1_EDH, w2_EHD]),
    ]


def ours(setting: Setting, experts: Experts) -> list[Arm]:
    """Our sparse layer with the routers that the project compares; those of k = 1 share the experts of the floor."""
    E, D = setting.E, setting.D
    halves = make_experts(setting, E, setting.hidden_width // 2)
    alone = make_experts(setting, 1, setting.hidden_width)
    routed: dict[str, tuple[Router, Experts]] = {
        "BASE": (BASE(num_experts=E, width=D), experts),
        "Switch 1.25": (Switch(num_experts=E, width=D), experts),
        "top-1": (TopK(num_experts=E, width=D, top_k=1, renormalize=False), experts),
        "top-2, half width": (TopK(num_experts=E, width=D, top_k=2), halves),
        ONE_EXPERT: (Dense(width=D), alone),
    }
    return [our_arm(name, setting, router, experts_of) for name, (router, experts_of) in routed.items()]


def our_arm(name: str, setting: Setting, router: Router, experts: Experts) -> Arm:
    """A sparse layer that routes every sequence by itself, as the peers do."""
    layer = SparseLayer(router, experts, routing_group=1).to(setting.device, setting.dtype)
    return Arm(name, routed_forward(layer, router), list(layer.parameters()), layer=layer)


def routed_forward(layer: Callable[[Tensor], tuple[Tensor, RoutingPlan]], router: Router) -> Forward:
    """A sparse layer and what its router does after a step: the next batch starts from the prices of this one."""

    def forward(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        y_BLD, plan = layer(x_BLD)
        router.end_step(router.step_sums(plan))
        return y_BLD, tuple(plan.losses.values())

    return forward


def compiled(arm: Arm) -> Arm:
    """The same arm through torch.compile; the router's state is kept outside, as in training."""
    if arm.layer is None:
        forward: Forward = torch.compile(arm.forward)
    else:
        forward = routed_forward(torch.compile(arm.layer), arm.layer.router)
    return Arm(f"{arm.name}, compiled", forward, arm.parameters, arm.note, arm.layer)


def make_experts(setting: Setting, num_experts: int, hidden_width: int) -> Experts:
    """Experts with weights everywhere: as initialised, half of them would be zero."""
    experts = Experts(num_experts=num_experts, width=setting.D, hidden_width=hidden_width)
    nn.init.normal_(experts.w2[0], std=hidden_width**-0.5)
    return experts.to(setting.device, setting.dtype)


def make_batches(setting: Setting, count: int = 4) -> list[Tensor]:
    """Normal tokens around a few hundred centres of unequal frequency, normalised as a transformer's are.

    Several batches, so that a router that starts from the batch before does not see the same one again.
    """
    draw = torch.Generator().manual_seed(0)
    centres = 4 * setting.E
    centre_CD = torch.randn(centres, setting.D, generator=draw)
    frequency_C = 1.0 / torch.arange(1, centres + 1)
    batches = []
    for _ in range(count):
        which_T = torch.multinomial(frequency_C**0.5, setting.T, replacement=True, generator=draw)
        x_TD = centre_CD[which_T] + torch.randn(setting.T, setting.D, generator=draw)
        x_BLD = F.layer_norm(x_TD, (setting.D,)).view(-1, setting.L, setting.D)
        batches.append(x_BLD.to(setting.device, setting.dtype).requires_grad_())
    return batches
