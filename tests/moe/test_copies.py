"""Experts of somebody else's architecture against each of them by itself. A assignments, D width, E experts."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_base.moe.copies import FeedForwardExperts

WIDTH, HIDDEN = 16, 24


class Gated(nn.Module):
    """As in Llama, with a bias in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Normed(Gated):
    """With a norm inside, whose gain is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "gated": (Gated, True),
    "as in GPT-2": (lambda: nn.Sequential(Conv1D(HIDDEN, WIDTH), nn.GELU(), Conv1D(WIDTH, HIDDEN)), True),
    "a single matrix": (lambda: nn.Linear(WIDTH, WIDTH), True),
    "with a norm inside": (Normed, False),
    "of odd widths": (lambda: nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, WIDTH)), True),
}
COUNTS = ([4, 4, 4], [5, 0, 7], [0, 0, 0], [0, 9, 0])


def experts_of(make: Callable[[], nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    made = [make().to(dtype) for _ in range(3)]
    with torch.no_grad():
        for parameter in (p for expert in made for p in expert.parameters()):
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_expert_computes_its_own_tokens_as_it_would_alone(name: str, dtype: torch.dtype) -> None:
    make, together = ARCHITECTURES[name]
    alone = experts_of(make, dtype)
    experts = FeedForwardExperts(alone, HIDDEN)
    assert experts.together == together
    close = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    for counts in COUNTS:
        x = torch.randn(sum(counts), WIDTH, dtype=dtype, requires_grad=True)
        expected = torch.cat([expert(rows) for expert, rows in zip(alone, x.split(counts), strict=True)])
        found = experts(x, torch.tensor(counts))
        torch.testing.assert_close(found, expected, **close)
        gradient = torch.randn_like(found)
        theirs = torch.autograd.grad(expected, [x, *(p for e in alone for p in e.parameters())], gradient)
        ours = torch.autograd.grad(found, [x, *experts.parameters()], gradient)
        torch.testing.assert_close(ours[0], theirs[0], **close)
        # DDP waits for every one, so that there has to be one for each expert, idle or not.
        by_name = dict(zip([key for key, _ in experts.network.named_parameters()], ours[1:], strict=True))
        each = len(by_name)
        for e, expert in enumerate(alone):
            for (key, _), gradient_of in zip(expert.named_parameters(), theirs[1 + e * each :], strict=False):
                owner = expert.get_submodule(key.rpartition(".")[0])
                turned = together and isinstance(owner, nn.Linear) and gradient_of.ndim == 2  # kept as [in, out]
                expected_of = gradient_of.T if turned else gradient_of
                torch.testing.assert_close(by_name[key][e], expected_of, **close)


class Halved(nn.Linear):
    """With a way of its own to compute."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_a_linear_layer_with_a_way_of_its_own_keeps_it_and_what_is_frozen_stays_so() -> None:
    alone = experts_of(lambda: Halved(WIDTH, WIDTH), torch.float64)
    experts = FeedForwardExperts(alone, WIDTH)
    assert not experts.together
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    expected = torch.cat([expert(rows) for expert, rows in zip(alone, x.split([3, 0, 4]), strict=True)])
    torch.testing.assert_close(experts(x, torch.tensor([3, 0, 4])), expected)
    frozen = nn.Linear(WIDTH, WIDTH)
    frozen.bias.requires_grad_(False)
    kept = FeedForwardExperts([frozen] * 2, WIDTH).network
    assert {key: p.requires_grad for key, p in kept.named_parameters()} == {"weight": True, "bias": False}


@pytest.mark.parametrize("name", ["gated", "with a norm inside"])
def test_a_rank_that_keeps_its_share_computes_its_share(name: str) -> None:
    experts = FeedForwardExperts([ARCHITECTURES[name][0]() for _ in range(4)], HIDDEN)
    tokens, counts = torch.randn(12, WIDTH), torch.tensor([2, 3, 4, 3])
    whole = experts(tokens, counts)
    for rank, (begin, end) in enumerate(((0, 5), (5, 12))):
        share = copy.deepcopy(experts)
        share.keep(rank, 2)
        assert share.held == range(2 * rank, 2 * rank + 2)
        found = share(tokens[begin:end], counts[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(found, whole[begin:end], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="4 experts cannot be shared equally by 3 ranks"):
        experts.keep(0, 3)


def test_copies_are_independent_of_each_other_and_of_what_they_were_copied_from() -> None:
    one = Gated()
    experts = FeedForwardExperts([one] * 3, HIDDEN)
    tokens = torch.randn(6, WIDTH)
    before = one(tokens)
    with torch.no_grad():
        experts.network.down.weight[1].zero_()
    found = experts(tokens, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(found[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    assert not found[2:4].any()
    assert torch.equal(one(tokens), before)
