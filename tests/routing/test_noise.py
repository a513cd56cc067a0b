"""Noise is a function of the step, the layer and the tokens read so far. T tokens, N numbers per token."""

import math

import torch
from router_arms import groups_of
from scipy import stats

from lightning_base.routing.noise import _between_0_and_1, normal_noise, uniform_noise


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed))


def test_it_is_uniform_and_normal() -> None:
    ids, groups = ids_of(4000), groups_of(2000, 2000)
    uniform = uniform_noise(ids, groups, 8, key=5, step=3)
    assert 0 < uniform.min() < uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    normal = normal_noise(ids, groups, 8, key=5, step=3)
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    # Columns and neighbouring tokens are not related: |r| of 4000 pairs is below 5 / sqrt(4000).
    for a, b in ((uniform[:, 0], uniform[:, 1]), (uniform[1:, 0], uniform[:-1, 0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / math.sqrt(4000)


def test_groups_together_or_alone_get_the_same_numbers() -> None:
    ids = ids_of(60)
    together = uniform_noise(ids, groups_of(20, 0, 40), 3, key=1, step=0)
    alone = [uniform_noise(part, groups_of(len(part)), 3, key=1, step=0) for part in (ids[:20], ids[20:])]
    assert torch.equal(together, torch.cat(alone))


def test_later_tokens_change_nothing_and_earlier_ones_everything() -> None:
    ids, groups = ids_of(40), groups_of(40)
    other = ids.clone()
    other[25] += 1
    before, after = (uniform_noise(x, groups, 2, key=1, step=0) for x in (ids, other))
    assert torch.equal(before[:25], after[:25])
    assert not torch.isclose(before[25:], after[25:]).any()


def test_steps_and_layers_differ() -> None:
    ids, groups = ids_of(40), groups_of(40)
    first = uniform_noise(ids, groups, 2, key=1, step=0)
    for key, step in ((2, 0), (1, 1), (0, 1)):
        assert not torch.isclose(first, uniform_noise(ids, groups, 2, key=key, step=step)).any()


def test_nothing_gives_nothing() -> None:
    assert uniform_noise(ids_of(0), groups_of(), 4, key=1, step=0).shape == (0, 4)
    assert uniform_noise(ids_of(0), groups_of(0, 0), 4, key=1, step=0).shape == (0, 4)


def test_no_bits_give_a_number_whose_normal_is_infinite() -> None:
    # All 24 bits set were rounded to 1 in float32, once in 17 million numbers.
    lowest, highest = _between_0_and_1(torch.tensor([0, 0xFFFFFF]))
    assert lowest.item() == 2**-24
    assert highest.item() == 1 - 2**-24
    assert torch.isfinite(torch.special.ndtri(torch.stack([lowest, highest]))).all()
