"""The experts: one architecture and one code path for every router.

Shapes: A assignments sorted by expert, D width, H hidden width, E experts, S sublayers.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.moe.memory import PRECISIONS
from lightning_base.moe.products import relu_experts

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Experts(nn.Module):
    """E expert networks f_e, each a stack of S residual blocks x + W2 act(W1 LayerNorm(x)) (Lewis et al. 2021, sec. 3).

    LayerNorm has no gain of its own: W1 absorbs it. W2 starts at zero, so that every expert starts as the identity.

    Args:
        num_experts: E.
        width: D, a multiple of 8.
        hidden_width: H of each block, a multiple of 8.
        sublayers: S.
        activation: relu (the paper's), gelu or silu.
        held: the experts that are to be here; None: all.

    Attributes:
        held: the experts whose parameters are here, which are the E of ``forward``.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        hidden_width: int,
        sublayers: int = 1,
        activation: Activation = "relu",
        held: range | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("hidden_width", hidden_width), ("sublayers", sublayers)):
            if value < 1:
                raise ValueError(f"{key}={value}: an expert needs at least 1")
        for key, value in (("width", width), ("hidden_width", hidden_width)):
            if value % 8:
                raise ValueError(
                    f"{key}={value} of an expert: a multiple of 8 is needed, because a grouped matmul takes rows of "
                    "16 bytes only, which are 8 numbers in half precision"
                )
        self.num_experts = num_experts
        self.held = range(num_experts) if held is None else held
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.ParameterList(torch.empty(len(self.held), width, hidden_width) for _ in range(sublayers))
        self.w2 = nn.ParameterList(torch.empty(len(self.held), hidden_width, width) for _ in range(sublayers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Expert by expert, so that the first experts of two layers agree whatever their number, and so that what is not
        # held can be drawn and dropped.
        for expert in range(self.held.stop):
            for w1 in self.w1:
                drawn = w1[expert - self.held.start] if expert in self.held else torch.empty_like(w1[0])
                nn.init.normal_(drawn, std=w1.shape[1] ** -0.5)
        for w2 in self.w2:
            nn.init.zeros_(w2)

    def keep(self, rank: int, ranks: int) -> None:
        """Forgets all experts but the share of one of several ranks, if there are others.

        Raises:
            ValueError: the ranks cannot hold equally many.
        """
        if (share := share_of(self.num_experts, rank, ranks)) == self.held:
            return
        self.held = share
        for weights in (self.w1, self.w2):
            for depth, whole in enumerate(weights):
                mine = whole.detach()[self.held.start : self.held.stop].clone()
                weights[depth] = nn.Parameter(mine, requires_grad=whole.requires_grad)

    @property
    def sublayers(self) -> int:
        return len(self.w1)

    @property
    def hidden_width(self) -> int:
        return self.w1[0].shape[-1]

    def forward(
        self, tokens_AD: Float[Tensor, "A D"], counts: Int64[Tensor, " E"], *, normalized: bool = False
    ) -> Float[Tensor, "A D"]:
        """What each token's expert adds to it, f_e(x) - x.

        Args:
            tokens_AD: the tokens of expert 0, then of expert 1, ...
            counts: tokens per expert, summing to A.
            normalized: given is LayerNorm(x) instead of x, which is all that experts of one sublayer look at.
        """
        hidden_AD, added_AD = tokens_AD, None
        for depth, (w1, w2) in enumerate(zip(self.w1, self.w2, strict=True), 1):
            normed_AD = hidden_AD if normalized else F.layer_norm(hidden_AD, hidden_AD.shape[-1:])
            update_AD = self._inner(normed_AD, w1, w2, counts)
            added_AD = update_AD if added_AD is None else added_AD + update_AD
            if depth < self.sublayers:
                hidden_AD = hidden_AD + update_AD
        assert added_AD is not None
        return added_AD

    def _inner(self, normed_AD: Tensor, w1: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
        """W2 act(W1 x)."""
        plain = normed_AD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.activation is F.relu and normed_AD.dtype == w1.dtype == w2.dtype in PRECISIONS:
            return relu_experts(normed_AD, w1, w2, counts)[0]
        return any_experts(normed_AD, w1, w2, counts, self.activation)


# torch.compile would break the graph at the counts anyway, and cannot trace grouped_mm in float32.
@torch.compiler.disable
def any_experts(
    x_AD: Float[Tensor, "A D"],
    w1_EDH: Float[Tensor, "E D H"],
    w2_EHD: Float[Tensor, "E H D"],
    counts: Int64[Tensor, " E"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "A D"]:
    """W2 act(W1 x) of each token's expert on any device, in any precision."""
    # Once for both products: on a GPU the host waits for the answer.
    equal = len(counts) > 1 and len(x_AD) > 0 and bool((counts == counts[0]).all())
    return expert_matmul(activation(expert_matmul(x_AD, w1_EDH, counts, equal)), w2_EHD, counts, equal)


def expert_matmul(
    x_AM: Float[Tensor, "A M"], weight_EMN: Float[Tensor, "E M N"], counts: Int64[Tensor, " E"], equal: bool
) -> Float[Tensor, "A N"]:
    """Each row times the matrix of its expert: one batched matmul if counts are equal, else a grouped one."""
    num_experts, _, width_out = weight_EMN.shape
    if torch.is_autocast_enabled(x_AM.device.type):
        # Autocast knows bmm but not grouped_mm; cast here, so that both paths compute in the same precision.
        dtype = torch.get_autocast_dtype(x_AM.device.type)
        x_AM, weight_EMN = x_AM.to(dtype), weight_EMN.to(dtype)
    if len(x_AM) == 0:
        # Keeps the weights in the graph: DDP waits for the gradient of every parameter.
        return x_AM @ weight_EMN.sum(0)
    if num_experts == 1:
        return x_AM @ weight_EMN[0]
    if equal:
        return torch.bmm(x_AM.view(num_experts, -1, x_AM.shape[1]), weight_EMN).view(-1, width_out)
    if x_AM.dtype == torch.float64 or x_AM.shape[1] % 8 or width_out % 8:
        # Neither is known to grouped_mm.
        rows = x_AM.split(counts.tolist())
        return torch.cat([x @ weight for x, weight in zip(rows, weight_EMN.unbind(), strict=True)])
    return F.grouped_mm(x_AM.contiguous(), weight_EMN, offs=counts.cumsum(0).to(torch.int32))


def share_of(num_experts: int, rank: int, ranks: int) -> range:
    """The experts that one of several ranks holds.

    Raises:
        ValueError: the ranks cannot hold equally many.
    """
    if num_experts % ranks:
        raise ValueError(f"{num_experts} experts cannot be shared equally by {ranks} ranks")
    share = num_experts // ranks
    return range(rank * share, (rank + 1) * share)
