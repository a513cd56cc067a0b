"""Noisy top-k against scipy: the gate, the noise, and both losses."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from router_arms import build_router, groups_of, random_tokens

from lightning_base.routing import NoisyTopK
from lightning_base.routing.noise import normal_noise
from lightning_base.routing.noisy_top_k import chance_of_being_kept

LN3 = 1.0986122886681098


def noisy(*, weights: float = 0.3, **options: object) -> NoisyTopK:
    """With both matrices drawn, as after some training; ``weights=0`` leaves them as they start."""
    router = build_router("noisy_top_k", **options)
    assert isinstance(router, NoisyTopK)
    generator = torch.Generator().manual_seed(3)
    for parameter in router.parameters():
        parameter.data += weights * torch.randn(parameter.shape, generator=generator)
    return router


def logits_by_numpy(
    router: NoisyTopK, tokens: torch.Tensor, noise: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x W_gate, softplus(x W_noise) and the noisy logits H of eq. 4, in double precision."""
    x = tokens.double().numpy()
    clean = x @ router.gate.weight.detach().double().numpy().T
    spread = np.logaddexp(0, x @ router.noise_gate.weight.detach().double().numpy().T)
    return clean, spread, clean + noise.double().numpy() * spread


def kth_excluding(values: np.ndarray, k: int, i: int) -> float:
    return float(np.sort(np.delete(values, i))[-k])


@pytest.mark.parametrize("k", [2, 3, 7])
def test_gates_and_losses_agree_with_scipy_in_training(k: int) -> None:
    router, groups, sizes = noisy(top_k=k), groups_of(17, 0, 23), (17, 0, 23)
    tokens, ids = random_tokens(40)
    noise = normal_noise(ids, groups, 8, key=int(router.key), step=0)
    clean, spread, logits = logits_by_numpy(router, tokens, noise)
    plan = router(tokens, ids, groups)

    gates, chance = np.zeros((40, 8)), np.zeros((40, 8))
    for t in range(40):
        kept = np.argsort(-logits[t])[:k]
        gates[t, kept] = scipy.special.softmax(logits[t, kept])
        for i in range(8):
            chance[t, i] = scipy.stats.norm.cdf((clean[t, i] - kth_excluding(logits[t], k, i)) / spread[t, i])
    found = np.zeros((40, 8))
    found[plan.token_index, plan.expert_index] = plan.weight.detach()
    np.testing.assert_allclose(found, gates, atol=2e-5)
    for name, values in (("importance_loss", gates), ("load_loss", chance)):
        held = [part for part in np.split(values, np.cumsum(sizes)[:-1]) if len(part)]
        # scipy's coefficient of variation divides by n, not n - 1, as the mean of squares in the paper does.
        expected = np.mean([scipy.stats.variation(part.sum(0)) ** 2 for part in held])
        assert plan.losses[name].item() == pytest.approx(expected, rel=2e-4), name


def test_the_chance_of_being_kept_is_how_often_fresh_noise_keeps_an_expert() -> None:
    rng = np.random.default_rng(0)
    clean, spread = rng.normal(size=5), rng.uniform(0.3, 1.5, size=5)
    drawn = clean + spread * rng.normal(size=5)
    chance = chance_of_being_kept(
        *(torch.tensor(values, dtype=torch.float64)[None] for values in (clean, drawn, spread)), k=2
    )[0]
    trials = 40_000
    for i in range(5):
        again = np.tile(drawn, (trials, 1))
        again[:, i] = clean[i] + spread[i] * rng.normal(size=trials)
        kept = (np.argsort(-again, axis=1)[:, :2] == i).any(1).mean()
        # Five standard deviations of a frequency over 40,000 trials are at most 0.0125.
        assert chance[i].item() == pytest.approx(kept, abs=0.0125)


def test_the_load_estimate_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, spread = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    inputs = (clean.requires_grad_(), spread.abs().add(0.3).detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda c, s: chance_of_being_kept(c, c + noise * s, s, 2), inputs)


def test_evaluation_has_no_noise_and_its_load_is_a_count() -> None:
    router = noisy(weights=0, width=3, num_experts=3).eval()
    router.gate.weight.data = torch.eye(3)
    # Kept: experts 0 and 1 twice, experts 0 and 2 once, gates 3/4 for the first and 1/4 for the second.
    tokens = torch.tensor([[LN3, 0.0, -5.0], [LN3, 0.0, -5.0], [LN3, -5.0, 0.0]])
    plan = router(tokens, torch.zeros(3, dtype=torch.int64), groups_of(3))
    assert plan.expert_index.tolist() == [0, 1, 0, 1, 0, 2]
    torch.testing.assert_close(plan.weight, torch.tensor([0.75, 0.25] * 3))
    # Counts (3, 2, 1): mean 2, variance 2/3, so 1/6. Importance (9/4, 1/2, 1/4): mean 1, variance
    # (25/16 + 4/16 + 9/16) / 3 = 19/24.
    assert plan.losses["load_loss"].item() == pytest.approx(1 / 6)
    assert plan.losses["importance_loss"].item() == pytest.approx(19 / 24)


def test_it_starts_with_no_signal_and_some_noise_and_so_nearly_even() -> None:
    router = noisy(weights=0, num_experts=4)
    assert not any(bool(parameter.any()) for parameter in router.parameters())
    tokens, ids = random_tokens(4_000)
    plan = router(tokens, ids, groups_of(4_000))
    # Each expert is kept for half of 4,000 tokens; the standard deviation of that is 32.
    assert all(abs(count - 2_000) < 5 * 32 for count in plan.demand.tolist())


def test_noise_of_almost_no_spread_leaves_finite_gradients() -> None:
    router = noisy(weights=0)
    # softplus(-200) is 0 in float32.
    router.noise_gate.weight.data.fill_(-200 / 16)
    tokens, ids = torch.ones(8, 16), torch.arange(8)
    sum(router(tokens, ids, groups_of(8)).losses.values()).backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in router.parameters())


def test_both_losses_have_the_coefficient_of_the_papers_language_models() -> None:
    assert noisy().loss_coefficients == {"importance_loss": 0.1, "load_loss": 0.1}
