"""Score matrices of the kinds that routers meet, drawn from a seed: for benchmarks, tests and the documentation.

Shape suffixes: T tokens, E experts, D width of the hidden states, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

D = 64


def correlated_centroids(num_tokens: int, num_experts: int, generator: torch.Generator) -> Float[Tensor, "T E"]:
    """Gaussian hidden states against centroids that share half of their variance."""
    shared_D = torch.randn(D, generator=generator)
    centroid_ED = (torch.randn(num_experts, D, generator=generator) + shared_D) / 2**0.5
    return torch.randn(num_tokens, D, generator=generator) @ centroid_ED.t() / D**0.5


def common_mean(num_tokens: int, num_experts: int, generator: torch.Generator) -> Float[Tensor, "T E"]:
    """Hidden states with a common mean three times as long as what tells them apart: few experts would take all."""
    hidden_TD = torch.randn(num_tokens, D, generator=generator) + 3 * torch.randn(D, generator=generator)
    return hidden_TD @ torch.randn(D, num_experts, generator=generator) / D**0.5


def zipf_clusters(num_tokens: int, num_experts: int, generator: torch.Generator) -> Float[Tensor, "T E"]:
    """Hidden states in 4 E tight clusters whose sizes follow Zipf's law."""
    cluster_T = _zipf(num_tokens, 4 * num_experts, generator)
    hidden_TD = torch.randn(4 * num_experts, D, generator=generator)[cluster_T]
    hidden_TD = hidden_TD + 0.3 * torch.randn(num_tokens, D, generator=generator)
    return hidden_TD @ torch.randn(D, num_experts, generator=generator) / D**0.5


def zipf_repeats(num_tokens: int, num_experts: int, generator: torch.Generator) -> Float[Tensor, "T E"]:
    """Embeddings of 8192 words drawn by Zipf's law, in bfloat16: many rows are equal to the last bit."""
    word_T = _zipf(num_tokens, 8192, generator)
    hidden_TD = torch.randn(8192, D, generator=generator)[word_T]
    return (hidden_TD @ torch.randn(D, num_experts, generator=generator) / D**0.5).bfloat16()


def _zipf(count: int, kinds: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(1.0 / torch.arange(1, kinds + 1), count, replacement=True, generator=generator)


EXAMPLES: Mapping[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "correlated centroids": correlated_centroids,
    "common mean": common_mean,
    "Zipf clusters": zipf_clusters,
    "Zipf repeats, bf16": zipf_repeats,
}
