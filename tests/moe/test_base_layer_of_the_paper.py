"""A BASE layer in one process against the layer as released, which runs on as many workers as there are experts.

There, worker w holds expert w and T tokens of its own. It assigns its own tokens, T/E to every expert, sends them off,
applies its expert to what it receives from everyone, and sends the results back. Here all experts are in one process,
and a worker's tokens are a routing group. The other side of the comparison is written from the formula, worker by
worker, with scipy for the assignment.

W workers, E = W experts, T tokens per worker, D width, S sublayers.
"""

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing import BASE

D, H = 16, 32


class Worker:
    """One rank of the released layer: an expert's stack of sublayers and its centroid."""

    def __init__(self, w1: list[Tensor], w2: list[Tensor], centroid: Tensor) -> None:
        self.sublayers = list(zip(w1, w2, strict=True))
        self.centroid = centroid

    def serve(self, received: Tensor) -> Tensor:
        """alpha f(h) + (1 - alpha) h with alpha = sigmoid(h . w), f a stack of x + W2 relu(W1 LayerNorm(x))."""
        hidden = received
        for w1, w2 in self.sublayers:
            centred = hidden - hidden.mean(1, keepdim=True)
            normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            hidden = hidden + torch.clamp(normed @ w1, min=0) @ w2
        alpha = (1 / (1 + torch.exp(-(received @ self.centroid))))[:, None]
        return alpha * hidden + (1 - alpha) * received


def balanced_by_scipy(scores: Tensor) -> list[list[int]]:
    """The tokens of each expert, equally many, that maximise the sum of scores [T, E]."""
    num_tokens, num_experts = scores.shape
    share = num_tokens // num_experts
    places = scores.double().repeat_interleave(share, dim=1).numpy()
    tokens, columns = scipy.optimize.linear_sum_assignment(places, maximize=True)
    return [[t for t, c in zip(tokens, columns, strict=True) if c // share == e] for e in range(num_experts)]


def released_layer(workers: list[Worker], batches: list[Tensor], greedy: bool) -> list[Tensor]:
    """What every worker gets back for its own tokens, [T, D] each."""
    centroids = torch.stack([worker.centroid for worker in workers])
    sent: list[list[list[int]]] = []
    for tokens in batches:
        scores = (tokens @ centroids.T).detach()
        if greedy:
            best = scores.argmax(1).tolist()
            sent.append([[t for t, e in enumerate(best) if e == expert] for expert in range(len(workers))])
        else:
            sent.append(balanced_by_scipy(scores))
    results = [torch.zeros_like(tokens) for tokens in batches]
    for expert, worker in enumerate(workers):
        inbox = torch.cat([tokens[sent[source][expert]] for source, tokens in enumerate(batches)])
        outbox = worker.serve(inbox).split([len(sent[source][expert]) for source in range(len(batches))])
        for source, returned in enumerate(outbox):
            results[source] = results[source].index_copy(0, torch.tensor(sent[source][expert]).long(), returned)
    return results


@pytest.mark.parametrize("greedy", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("sublayers", [1, 3])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_one_process_gives_what_the_workers_give(num_workers: int, sublayers: int, greedy: bool) -> None:
    torch.manual_seed(0)
    router = BASE(num_experts=num_workers, width=D)
    experts = Experts(num_experts=num_workers, width=D, hidden_width=H, sublayers=sublayers)
    nn.init.normal_(router.centroids, std=0.3)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    # Two sequences of 10 tokens per worker; the released layer scores the hidden state itself, without a norm.
    layer = SparseLayer(router, experts, routing_group=2, router_norm=False).train(not greedy)
    hidden = torch.randn(2 * num_workers, 10, D)
    upstream = torch.randn_like(hidden)

    ours_in = hidden.clone().requires_grad_()
    ours_out, plan = layer(ours_in, torch.zeros(hidden.shape[:2], dtype=torch.int64))
    leaves = [ours_in, router.centroids, *experts.w1, *experts.w2]
    ours = torch.autograd.grad((ours_out * upstream).sum(), leaves)

    theirs_in = hidden.clone().requires_grad_()
    centroids = router.centroids.detach().clone().requires_grad_()
    w1 = [w.detach().clone().requires_grad_() for w in experts.w1]
    w2 = [w.detach().clone().requires_grad_() for w in experts.w2]
    workers = [Worker([w[e] for w in w1], [w[e] for w in w2], centroids[e]) for e in range(num_workers)]
    returned = released_layer(workers, list(theirs_in.view(num_workers, 20, D).unbind()), greedy)
    theirs_out = torch.stack(returned).view_as(hidden)
    theirs = torch.autograd.grad((theirs_out * upstream).sum(), [theirs_in, centroids, *w1, *w2])

    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if not greedy:
        # Every worker sends every expert the same number of tokens.
        assert plan.group_demand.tolist() == [[20 // num_workers] * num_workers] * num_workers


def test_a_new_layer_is_the_identity() -> None:
    torch.manual_seed(0)
    router = BASE(num_experts=4, width=D)
    experts = Experts(num_experts=4, width=D, hidden_width=H, sublayers=3)
    router.reset_parameters()
    experts.reset_parameters()
    hidden = torch.randn(2, 8, D)
    output, _ = SparseLayer(router, experts, routing_group=1, router_norm=False)(
        hidden, torch.zeros(2, 8, dtype=torch.int64)
    )
    assert torch.equal(output, hidden)
