"""Score matrices of the kinds that routers meet, drawn from a seed: for benchmarks, tests and the documentation.

Each kind is a family. `EXAMPLES` has one member of each, `VARIATIONS` many, from easy to hard.

Shape suffixes: T tokens, E experts, D width of the hidden states, W words.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

Draw = Callable[[int, int, torch.Generator], Tensor]


def correlated_centroids(
    num_tokens: int,
    num_experts: int,
    generator: torch.Generator,
    *,
    shared: float = 0.5,
    width: int = 64,
    spread: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "T E"]:
    """Gaussian hidden states against centroids that share this much of their variance.

    With `spread`, the lengths of the hidden states differ: their logarithms have this standard deviation.
    """
    shared_D = torch.randn(width, generator=generator)
    own_ED = torch.randn(num_experts, width, generator=generator)
    centroid_ED = (1 - shared) ** 0.5 * own_ED + shared**0.5 * shared_D
    hidden_TD = torch.randn(num_tokens, width, generator=generator)
    if spread:
        hidden_TD = hidden_TD * (spread * torch.randn(num_tokens, 1, generator=generator)).exp()
    return (hidden_TD @ centroid_ED.t() / width**0.5).to(dtype)


def common_mean(
    num_tokens: int,
    num_experts: int,
    generator: torch.Generator,
    *,
    strength: float = 3.0,
    width: int = 64,
    spread: float = 0.0,
) -> Float[Tensor, "T E"]:
    """Hidden states with a common mean `strength` times as long as what tells them apart: few experts would take all.

    With `spread`, what tells them apart differs in length: its logarithms have this standard deviation.
    """
    own_TD = torch.randn(num_tokens, width, generator=generator)
    if spread:
        own_TD = own_TD * (spread * torch.randn(num_tokens, 1, generator=generator)).exp()
    hidden_TD = own_TD + strength * torch.randn(width, generator=generator)
    return hidden_TD @ torch.randn(width, num_experts, generator=generator) / width**0.5


def zipf_clusters(
    num_tokens: int,
    num_experts: int,
    generator: torch.Generator,
    *,
    per_expert: float = 4.0,
    tightness: float = 0.3,
    exponent: float = 1.0,
    width: int = 64,
) -> Float[Tensor, "T E"]:
    """Hidden states in `per_expert` E clusters of radius `tightness` whose sizes follow Zipf's law."""
    clusters = max(2, int(per_expert * num_experts))
    cluster_T = _zipf(num_tokens, clusters, exponent, generator)
    hidden_TD = torch.randn(clusters, width, generator=generator)[cluster_T]
    hidden_TD = hidden_TD + tightness * torch.randn(num_tokens, width, generator=generator)
    return hidden_TD @ torch.randn(width, num_experts, generator=generator) / width**0.5


def zipf_repeats(
    num_tokens: int,
    num_experts: int,
    generator: torch.Generator,
    *,
    words: int = 8192,
    exponent: float = 1.0,
    mean: float = 0.0,
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "T E"]:
    """Embeddings of words drawn by Zipf's law: many rows are equal to the last bit. `mean` as in `common_mean`."""
    word_T = _zipf(num_tokens, words, exponent, generator)
    embedding_WD = torch.randn(words, width, generator=generator)
    centroid_DE = torch.randn(width, num_experts, generator=generator)
    if mean:
        embedding_WD = embedding_WD + mean * torch.randn(width, generator=generator)
    return (embedding_WD[word_T] @ centroid_DE / width**0.5).to(dtype)


def _zipf(count: int, kinds: int, exponent: float, generator: torch.Generator) -> Tensor:
    weight = torch.arange(1, kinds + 1).double() ** -exponent
    return torch.multinomial(weight.float(), count, replacement=True, generator=generator)


EXAMPLES: Mapping[str, Draw] = {
    "correlated centroids": correlated_centroids,
    "common mean": common_mean,
    "Zipf clusters": zipf_clusters,
    "Zipf repeats, bf16": zipf_repeats,
}

VARIATIONS: Mapping[str, Mapping[str, Draw]] = {
    "correlated centroids": {
        "as drawn": correlated_centroids,
        "shared 0": partial(correlated_centroids, shared=0.0),
        "shared 0.9": partial(correlated_centroids, shared=0.9),
        "shared 0.99": partial(correlated_centroids, shared=0.99),
        "width 8": partial(correlated_centroids, width=8),
        "width 512": partial(correlated_centroids, width=512),
        "spread 1": partial(correlated_centroids, spread=1.0),
        "bf16": partial(correlated_centroids, dtype=torch.bfloat16),
    },
    "common mean": {
        "as drawn": common_mean,
        "strength 1": partial(common_mean, strength=1.0),
        "strength 10": partial(common_mean, strength=10.0),
        "strength 30": partial(common_mean, strength=30.0),
        "strength 10, width 8": partial(common_mean, strength=10.0, width=8),
        "strength 3, spread 1": partial(common_mean, spread=1.0),
        "strength 10, spread 2": partial(common_mean, strength=10.0, spread=2.0),
    },
    "Zipf clusters": {
        "as drawn": zipf_clusters,
        "E clusters": partial(zipf_clusters, per_expert=1.0),
        "E / 4 clusters": partial(zipf_clusters, per_expert=0.25),
        "16 E clusters": partial(zipf_clusters, per_expert=16.0),
        "radius 0.03": partial(zipf_clusters, tightness=0.03),
        "radius 0.003": partial(zipf_clusters, tightness=0.003),
        "E clusters, radius 0.03": partial(zipf_clusters, per_expert=1.0, tightness=0.03),
        "radius 1": partial(zipf_clusters, tightness=1.0),
        "exponent 1.5": partial(zipf_clusters, exponent=1.5),
        "exponent 0": partial(zipf_clusters, exponent=0.0),
        "width 8": partial(zipf_clusters, width=8),
    },
    "Zipf repeats, bf16": {
        "as drawn": zipf_repeats,
        "exponent 0.5": partial(zipf_repeats, exponent=0.5),
        "exponent 1.2": partial(zipf_repeats, exponent=1.2),
        "exponent 1.5": partial(zipf_repeats, exponent=1.5),
        "512 words": partial(zipf_repeats, words=512),
        "512 words, exponent 0": partial(zipf_repeats, words=512, exponent=0.0),
        "65536 words": partial(zipf_repeats, words=65536),
        "width 8": partial(zipf_repeats, width=8),
        "mean 3": partial(zipf_repeats, mean=3.0),
        "float32": partial(zipf_repeats, dtype=torch.float32),
    },
}
