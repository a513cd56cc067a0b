"""A compact decoder-only transformer with a slot for the feed-forward layer.

Shapes: B sequences, L positions, D width, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_base.moe.experts import ACTIVATIONS, Activation, Experts, share_of
from lightning_base.moe.layer import SparseLayer
from lightning_base.moe.shuffle import Shuffle
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router
from lightning_base.sparse_model import ModelOutput, SparseModel


class Projection(nn.Linear):
    """A matrix without bias, drawn from N(0, 1/fan_in), or zero for one that writes into the residual stream."""

    def __init__(self, width_in: int, width_out: int, *, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(width_in, width_out, bias=False)

    def reset_parameters(self) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.in_features**-0.5)


class Embedding(nn.Embedding):
    """Drawn from N(0, 0.02^2): it is the output matrix too, so that logits start small."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021) or none."""

    def __init__(self, width: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = Projection(width, 3 * width)
        self.out = Projection(width, width, zero=True)

    def forward(self, hidden: Float[Tensor, "B L D"], mask: Tensor | None) -> Float[Tensor, "B L D"]:
        batch, length, width = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            query, key = rotate(query), rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x: Float[Tensor, "B N L H"]) -> Float[Tensor, "B N L H"]:
    """Rotary position embedding of the halves of each head, base 10,000."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class FeedForward(nn.Module):
    """x + W2 act(W1 LayerNorm(x)): what one block of an expert is."""

    def __init__(self, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.w1 = Projection(width, hidden_width)
        self.w2 = Projection(hidden_width, width, zero=True)

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return hidden + self.w2(self.activation(self.w1(F.layer_norm(hidden, hidden.shape[-1:]))))


class Block(nn.Module):
    """Attention, if any, then a feed-forward layer, dense or sparse; both pre-norm with a residual."""

    def __init__(self, attention: Attention | None, feed_forward: FeedForward | SparseLayer, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if attention is not None else None
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(
        self, hidden: Tensor, token_ids: Tensor, valid: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, RoutingPlan | None]:
        if self.attention is not None and self.norm is not None:
            hidden = hidden + self.attention(self.norm(hidden), mask)
        if isinstance(self.feed_forward, SparseLayer):
            return self.feed_forward(hidden, token_ids, valid)
        return self.feed_forward(hidden), None


class Transformer(SparseModel):
    """Decoder-only language model, pre-norm, tied embeddings.

    Args:
        vocab_size: V.
        sequence_length: the longest L.
        width: D.
        depth: blocks of attention and feed-forward.
        heads: attention heads, dividing D.
        ffn_width: hidden width of a dense feed-forward layer, and of one expert.
        positions: rotary, or learned and added to the embedding.
        activation: of every feed-forward layer and expert.
        make_router: builds the router of one sparse layer.
        routing_group: sequences routed together.
        placement: sparse layers ``replace`` feed-forward layers, or are ``insert``ed between blocks.
        sparse_layers: which; see ``sparse_positions``.
        sublayers: residual blocks per expert.
        split_width: a router with k > 1 gets experts of width ffn_width / k, so that a token costs the same.
        router_norm: routers see LayerNorm(h) instead of h.
        shuffle_tokens: in training, tokens are dealt out at random to the routing groups of the step, or of each so
            many of its sequences; see ``Shuffle``.
        checkpoint_activations: recompute the blocks in the backward pass instead of storing them.
        expert_share: which of how many ranks this is among those that share the experts.
    """

    blocks: nn.ModuleDict

    def __init__(
        self,
        *,
        vocab_size: int,
        sequence_length: int,
        width: int,
        depth: int,
        heads: int,
        ffn_width: int,
        make_router: Callable[[], Router],
        routing_group: int,
        positions: Literal["rotary", "learned"] = "rotary",
        activation: Activation = "relu",
        placement: Literal["replace", "insert"] = "replace",
        sparse_layers: Literal["every_other"] | int | list[int] = "every_other",
        sublayers: int = 1,
        split_width: bool = True,
        router_norm: bool = True,
        shuffle_tokens: bool | int = False,
        checkpoint_activations: bool = False,
        expert_share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(vocab_size, width)
        self.position = Embedding(sequence_length, width) if positions == "learned" else None

        def sparse() -> SparseLayer:
            router = make_router()
            if split_width and ffn_width % router.top_k:
                raise ValueError(
                    f"model.ffn_width={ffn_width} is not divisible by router.top_k={router.top_k}, so that experts of "
                    "ffn_width / k would not cost the same: choose a multiple or set model.split_width=false"
                )
            hidden_width = ffn_width // router.top_k if split_width else ffn_width
            experts = Experts(
                num_experts=router.num_experts,
                width=width,
                hidden_width=hidden_width,
                sublayers=sublayers,
                activation=activation,
                held=share_of(router.num_experts, *expert_share),
            )
            shuffle = None
            if shuffle_tokens is not False:
                shuffle = Shuffle(routing_group, None if shuffle_tokens is True else shuffle_tokens)
            return SparseLayer(router, experts, routing_group=routing_group, router_norm=router_norm, shuffle=shuffle)

        chosen = sparse_positions(sparse_layers, depth, placement)
        blocks: dict[str, Block] = {}
        for i in range(depth):
            if placement == "insert":
                blocks.update({f"sparse_{j}": Block(None, sparse(), width) for j in chosen if j == i})
            replaced = placement == "replace" and i in chosen
            attention = Attention(width, heads, rotary=positions == "rotary")
            layer = sparse() if replaced else FeedForward(width, ffn_width, activation)
            blocks[f"layer_{i}"] = Block(attention, layer, width)
        if placement == "insert" and depth in chosen:
            blocks[f"sparse_{depth}"] = Block(None, sparse(), width)
        self.blocks = nn.ModuleDict(blocks)
        self.norm = nn.LayerNorm(width)
        for name, layer in self.sparse_layers.items():
            layer.router.layer = name

    @property
    def stages(self) -> dict[str, nn.Module]:
        return {"embedding": self.embedding, **self.blocks, "norm": self.norm}

    @property
    def sparse_layers(self) -> dict[str, SparseLayer]:
        found = {}
        for name, block in self.blocks.items():
            layer = block.feed_forward
            if isinstance(layer, SparseLayer):
                found[name] = layer
        return found

    def forward(
        self,
        input_ids: Int64[Tensor, "B L"],
        valid: Bool[Tensor, "B L"] | None = None,
        document: Int64[Tensor, "B L"] | None = None,
    ) -> ModelOutput:
        hidden = self.embedding(input_ids)
        if self.position is not None:
            hidden = hidden + self.position.weight[: input_ids.shape[1]]
        mask = None if document is None else document_mask(document)
        plans: dict[str, RoutingPlan] = {}
        for name, block in self.blocks.items():
            if self.checkpoint_activations and self.training:
                hidden, plan = checkpoint(block, hidden, input_ids, valid, mask, use_reentrant=False)
            else:
                hidden, plan = block(hidden, input_ids, valid, mask)
            # The plan is a return value, not something stored on the way: recomputation cannot count it twice.
            if plan is not None:
                plans[name] = plan
        logits = F.linear(self.norm(hidden), self.embedding.weight)
        return ModelOutput(logits, plans)


def document_mask(document: Int64[Tensor, "B L"]) -> Bool[Tensor, "B 1 L L"]:
    """True where a position may look: not ahead, and not into another document."""
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def sparse_positions(layers: Literal["every_other"] | int | list[int], depth: int, placement: str) -> list[int]:
    """Where the sparse layers go.

    Args:
        layers: ``every_other`` (the second, fourth, ... feed-forward, as in Switch), a list of positions, or a number n
            spread evenly: position ((i + 1) * depth) // (n + 1) for the i-th, as BASE was released.
        depth: dense blocks.
        placement: with ``replace`` position i is the feed-forward of block i; with ``insert`` it is before block i, and
            ``depth`` is the end.
    """
    last = depth if placement == "insert" else depth - 1
    if layers == "every_other":
        return list(range(1, depth, 2)) or [0]
    if isinstance(layers, int):
        if not 0 < layers <= depth:
            raise ValueError(f"model.sparse_layers={layers}: between 1 and model.depth={depth} layers can be sparse")
        return [((i + 1) * depth) // (layers + 1) for i in range(layers)]
    positions = sorted(set(layers))
    if not positions or positions[0] < 0 or positions[-1] > last or len(positions) < len(layers):
        raise ValueError(f"model.sparse_layers={layers}: give different positions between 0 and {last}")
    return positions


def initialize(model: nn.Module, seed: int, router_scale: float = 1.0, *, within: str = "") -> None:
    """Draws every parameter anew, each module from a generator seeded by ``seed`` and the module's name.

    So that a router with other or more parameters does not shift the weights of any other module. Inner modules come
    first: what a module draws for its parts, such as a router for its gate, is what stays. Parameters of routers are
    then multiplied by ``router_scale``. ``within`` goes before the names, where ``model`` is a part of one.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed(list(model.named_modules())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                digest = hashlib.sha256(f"{seed}:{within}{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                reset()
    with torch.no_grad():
        for parameter in (p for m in model.modules() if isinstance(m, Router) for p in m.parameters()):
            parameter.mul_(router_scale)


def shared_parameters(model: SparseModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that every arm of a comparison has: all outside the sparse layers."""
    sparse = {id(p) for layer in model.sparse_layers.values() for p in layer.parameters()}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in sparse)


def weights_fingerprint(parameters: Iterator[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
