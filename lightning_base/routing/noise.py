"""Random numbers for routers: a function of the step and of the tokens read so far, and of nothing else.

A generator's next number depends on how many were drawn before, and so on how many groups a rank holds, on
accumulation, and on whether a block is computed twice under activation checkpointing. Hashing has none of that: the
same text at the same step gets the same noise on one rank or on eight, and a token's noise knows no later token.

Shapes: T tokens, N numbers per token.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups


def uniform_noise(
    token_ids: Int64[Tensor, " T"], groups: RoutingGroups, count: int, *, key: int, step: int
) -> Float[Tensor, "T N"]:
    """``count`` numbers in (0, 1) for every token.

    Args:
        token_ids: [T].
        groups: the routing groups; each starts reading anew.
        count: N.
        key: tells layers apart.
        step: tells optimizer steps apart.
    """
    device = token_ids.device
    starts = torch.tensor(groups.starts(), device=device, dtype=torch.int64)
    position_T = torch.arange(len(token_ids), device=device) - starts[groups.index(device)]
    # Sums of hashes of (position, token) are hashes of a prefix; int64 wraps around.
    total_T = _mix(_mix(position_T) + token_ids).cumsum(0)
    before_G = torch.cat([total_T.new_zeros(1), total_T])[starts]
    prefix_T = total_T - before_G[groups.index(device)]
    seed_T = _mix(prefix_T + _mix(torch.tensor(key, device=device)) + _mix(torch.tensor(step + 1, device=device)) * 3)
    bits_TN = _mix(seed_T[:, None] + _mix(torch.arange(count, device=device)))
    return _between_0_and_1(bits_TN)


def normal_noise(
    token_ids: Int64[Tensor, " T"], groups: RoutingGroups, count: int, *, key: int, step: int
) -> Float[Tensor, "T N"]:
    """``count`` numbers from N(0, 1) for every token; arguments as in ``uniform_noise``."""
    return torch.special.ndtri(uniform_noise(token_ids, groups, count, key=key, step=step))


def permutation(count: int, *, key: int, step: int, part: int = 0) -> Int64[Tensor, " N"]:
    """A random order of 0 ... N - 1, on the host.

    Args:
        count: N.
        key: tells layers apart.
        step: tells optimizer steps apart.
        part: tells apart what is permuted within one step.
    """
    seeds = torch.tensor([key, step + 1, part + 1])
    seed = (_mix(seeds) * torch.tensor([1, 3, 5])).sum()
    # Sorting hashes, because torch guarantees those and not what its generators draw; equal ones keep their order.
    return torch.argsort(_mix(_mix(torch.arange(count)) + seed), stable=True)


def draw_key() -> Int64[Tensor, ""]:
    """A key from torch's global generator, which the model seeds for every module by name."""
    return torch.randint(2**62, (), dtype=torch.int64)


def _between_0_and_1(bits: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The middles of 2^23 equal intervals, by bits 1 to 23: 24 digits with the half, which is what float32 holds.

    With one bit more the last middle would be rounded to 1, whose normal number is infinite.
    """
    return (((bits & 0xFFFFFF) >> 1).float() + 0.5) / 2**23


def _mix(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
