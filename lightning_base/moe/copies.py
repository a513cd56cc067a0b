"""Experts of the architecture of somebody else's feed-forward module, such as a SwiGLU.

Shapes: A assignments sorted by expert, D width, E experts, M and N widths of a matrix.
"""

import copy
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from lightning_base.moe.experts import expert_matmul, share_of


class ExpertLinear(nn.Module):
    """The linear layers of E experts as one: each row meets the matrix of its expert.

    Attributes:
        counts: rows of each expert in the next call, [E]; set by ``FeedForwardExperts``.
        equal: whether they are all the same.
    """

    counts: Tensor
    equal: bool

    def __init__(self, weight_EMN: Float[Tensor, "E M N"], bias_EN: Float[Tensor, "E N"] | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_EMN)
        self.bias = None if bias_EN is None else nn.Parameter(bias_EN)

    def forward(self, x_AM: Float[Tensor, "A M"]) -> Float[Tensor, "A N"]:
        result_AN = expert_matmul(x_AM, self.weight, self.counts, self.equal)
        if self.bias is None:
            return result_AN
        bias_AN = self.bias.repeat_interleave(self.counts, dim=0, output_size=len(x_AM))
        return result_AN + bias_AN.to(result_AN.dtype)


class FeedForwardExperts(nn.Module):
    """E experts, each a module from [A, D] to [A, D] that looks at every token by itself, of any architecture.

    The module's own code runs, with parameters that hold those of all experts along a first dimension. Where all
    parameters are those of linear layers, it runs once for all tokens, and every linear layer is one product of all
    experts. Other modules run expert by expert.

    Args:
        networks: the experts, alike but for their values; the same module may come several times.
        hidden_width: for the record.
        num_experts: E, if these are not all.
        held: which these are; None: all.

    Attributes:
        num_experts: E.
        held: the experts whose parameters are here.
        together: whether the module runs once for all tokens.

    Raises:
        ValueError: no expert.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        hidden_width: int,
        *,
        num_experts: int | None = None,
        held: range | None = None,
    ) -> None:
        super().__init__()
        given = list(networks)
        if not given:
            raise ValueError("a layer needs at least 1 expert")
        self.num_experts, self.hidden_width = num_experts or len(given), hidden_width
        self.held = range(len(given)) if held is None else held
        self.network = copy.deepcopy(given[0])
        linear = {name for name, part in self.network.named_modules() if is_linear(part)}
        owners = {name.rpartition(".")[0] for name, _ in self.network.named_parameters()}
        self.together = owners <= linear
        for name, part in list(self.network.named_modules()):
            parts = [expert.get_submodule(name) for expert in given]
            if self.together and name in linear:
                weight_EMN = torch.stack([as_mn(each) for each in parts])
                biases = [] if part.bias is None else [each.get_parameter("bias").detach() for each in parts]
                bias_EN = torch.stack(biases) if biases else None
                product = ExpertLinear(weight_EMN, bias_EN)
                for key, parameter in product.named_parameters():
                    parameter.requires_grad_(part.get_parameter(key).requires_grad)
                _put(self, f"network.{name}".rstrip("."), product)
            elif not self.together:
                for key, parameter in part.named_parameters(recurse=False):
                    values = torch.stack([each.get_parameter(key).detach() for each in parts])
                    part.register_parameter(key, nn.Parameter(values, requires_grad=parameter.requires_grad))

    def keep(self, rank: int, ranks: int) -> None:
        """Forgets all experts but the share of one of several ranks, if there are others.

        Raises:
            ValueError: the ranks cannot hold equally many.
        """
        if (share := share_of(self.num_experts, rank, ranks)) == self.held:
            return
        self.held = share
        for part in self.network.modules():
            for key, whole in part.named_parameters(recurse=False):
                mine = whole.detach()[self.held.start : self.held.stop].clone()
                part.register_parameter(key, nn.Parameter(mine, requires_grad=whole.requires_grad))

    # Counts decide the shapes, which a compiler cannot know.
    @torch.compiler.disable
    def forward(self, tokens_AD: Float[Tensor, "A D"], counts: Int64[Tensor, " E"]) -> Float[Tensor, "A D"]:
        """What each token's expert makes of it, without a residual.

        Args:
            tokens_AD: the tokens of expert 0, then of expert 1, ...
            counts: tokens per expert, summing to A.
        """
        if self.together:
            # Once for all products, as in ``experts.any_experts``.
            equal = len(counts) > 1 and len(tokens_AD) > 0 and bool((counts == counts[0]).all())
            for part in self.network.modules():
                if isinstance(part, ExpertLinear):
                    part.counts, part.equal = counts, equal
            result_AD: Tensor = self.network(tokens_AD)
            return result_AD
        # Taken apart at once: each expert's gradient would otherwise be as large as that of all.
        by_name = {name: stacked.unbind() for name, stacked in self.network.named_parameters()}
        return torch.cat(
            [
                functional_call(self.network, {name: experts[e] for name, experts in by_name.items()}, (rows,))
                for e, rows in enumerate(tokens_AD.split(counts.tolist()))
            ]
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is x W + b, as torch has it or as GPT-2 of transformers does, with W the other way round."""
    # One with a way of its own to compute, such as a quantised one, is not taken for its product.
    kind = type(module)
    return (
        kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"
    )


def as_mn(module: nn.Module) -> Float[Tensor, "M N"]:
    """The matrix W of x W + b."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if isinstance(module, nn.Linear) else weight


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(root.get_submodule(parent), key, module)
