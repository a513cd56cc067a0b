"""A causal language model of ``transformers`` whose feed-forward layers became sparse.

Shapes: B sequences, L positions, V vocabulary, E experts.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from lightning_base.drop_in import DropIn
from lightning_base.huggingface.layers import sparse_names
from lightning_base.huggingface.source import draw, hidden_width, load
from lightning_base.model import document_mask, initialize
from lightning_base.moe.copies import FeedForwardExperts
from lightning_base.moe.experts import share_of
from lightning_base.moe.layer import SparseLayer
from lightning_base.moe.shuffle import Shuffle
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router
from lightning_base.sparse_model import ModelOutput, SparseModel


class Slot(DropIn):
    """A ``DropIn`` whose plan is handed on with its graph, for a module that counts steps and losses by itself."""

    def _take(self, plan: RoutingPlan) -> None:
        self._live = plan

    def read(self, token_ids: Tensor | None, valid: Tensor | None) -> None:
        """What the next passes are of."""
        self._token_ids, self._valid = token_ids, valid

    @torch.compiler.disable
    def taken(self) -> RoutingPlan:
        """The plan of the last pass, once."""
        plan, self._live = self._live, None
        assert plan is not None
        return plan


class HuggingFaceModel(SparseModel):
    """A model of ``transformers``; whatever stands outside of its sparse layers is its own.

    The weights outside are the loaded ones, or those that ``transformers`` draws after ``torch.manual_seed(seed)``,
    whatever the router. Experts have the architecture of the feed-forward layer in whose place they are. The first
    starts as that layer does, unless it is narrower; the others are copies of it, or are drawn as it was, each from
    the seed, the layer's name and its number.

    Args:
        config: a ``PreTrainedConfig``.
        weights: a folder to load them from; None draws them.
        layers: see ``sparse_names``.
        upcycle: whether all experts start as copies.
        split_width: experts of a router with k > 1 are 1/k as wide.
        router_norm: routers see LayerNorm(h) instead of h, where h is what the feed-forward layer is given.
        shuffle_tokens: see ``Transformer``.
        make_router: builds the router of one sparse layer.
        routing_group: sequences routed together.
        checkpoint_activations: recompute the blocks in the backward pass instead of storing them.
        seed: of everything that is drawn.
        router_scale: how many times larger than its paper has them the parameters of a router are at first.
        expert_share: which of how many ranks this is among those that share the experts.
    """

    packages = ("transformers",)
    network: Any

    def __init__(
        self,
        config: Any,
        weights: Path | None,
        *,
        layers: str | Sequence[str],
        upcycle: bool,
        split_width: bool,
        router_norm: bool,
        shuffle_tokens: bool | int,
        make_router: Callable[[], Router],
        routing_group: int,
        checkpoint_activations: bool,
        seed: int,
        router_scale: float,
        expert_share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        described = config.to_json_string(use_diff=True)
        self.architecture = {"config": json.loads(described), "sha256": hashlib.sha256(described.encode()).hexdigest()}
        self.network = draw(config, seed) if weights is None else load(weights, config)
        if checkpoint_activations:
            self.network.activation_checkpointing_enable({"use_reentrant": False})
        self._slots: dict[str, Slot] = {}
        narrower: nn.Module | None = None
        for name in sparse_names(self.network, layers, config.hidden_size):
            router = make_router()
            router.layer = name
            initialize(router, seed, router_scale, within=f"{name}.router.")
            width = hidden_width(config)
            if split_width and router.top_k > 1 and not upcycle:
                assert width is not None
                width = (width[0], width[1] // router.top_k)
                if narrower is None:
                    # Drawn and not outlined: some modules have values that only their construction gives.
                    split = copy.deepcopy(config)
                    setattr(split, *width)
                    narrower = draw(split, seed)
                like = narrower.get_submodule(name)
            else:
                like = self.network.get_submodule(name)
            held = share_of(router.num_experts, *expert_share)
            experts = [like] * len(held) if upcycle else list(self._drawn(like, name, held, seed))
            shuffle = None
            if shuffle_tokens is not False:
                shuffle = Shuffle(routing_group, None if shuffle_tokens is True else shuffle_tokens)
                initialize(shuffle, seed, within=f"{name}.shuffle.")
            layer = SparseLayer(
                router,
                FeedForwardExperts(
                    experts, 0 if width is None else width[1], num_experts=router.num_experts, held=held
                ),
                routing_group=routing_group,
                router_norm=router_norm,
                residual=False,
                shuffle=shuffle,
            )
            self._slots[name] = Slot(layer)
            self.network.set_submodule(name, self._slots[name])
        self.blocks = dict(repeated(self.network))
        self._reading: tuple[Tensor | None, Tensor | None] = (None, None)

    def _drawn(self, like: nn.Module, name: str, held: range, seed: int) -> Iterator[nn.Module]:
        """Some of the experts of the shape of a module; the first of all is it."""
        for expert in held:
            if expert == 0:
                yield like
                continue
            made = copy.deepcopy(like)
            with _seeded(f"{seed}:{name}.experts.{expert}"), torch.no_grad():
                # Inner modules first: a module may draw anew what its parts have drawn.
                for module in reversed(list(made.modules())):
                    self.network._init_weights(module)
            yield made

    @property
    def sparse_layers(self) -> dict[str, SparseLayer]:
        return {name: slot.layer for name, slot in self._slots.items()}

    @property
    def stages(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"embedding": self.network.get_input_embeddings()}
        for name, block in self.blocks.items():
            found |= {inner: slot for inner, slot in self._slots.items() if inner.startswith(f"{name}.")}
            found[name] = block
        return {**found, **self._slots, "head": self.network.get_output_embeddings()}

    def forward(
        self,
        input_ids: Int64[Tensor, "B L"],
        valid: Bool[Tensor, "B L"] | None = None,
        document: Int64[Tensor, "B L"] | None = None,
    ) -> ModelOutput:
        before = self._reading
        self._read(input_ids, valid)
        # Padding is at the end of a sequence, where nobody that counts looks at it.
        mask = None if document is None else document_mask(document)
        logits = self.network(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        if not torch.is_grad_enabled():
            # Activation checkpointing may still have to repeat the last pass with a gradient.
            self._read(*before)
        return ModelOutput(logits, {name: slot.taken() for name, slot in self._slots.items()})

    @torch.compiler.disable
    def _read(self, token_ids: Tensor | None, valid: Tensor | None) -> None:
        self._reading = (token_ids, valid)
        for slot in self._slots.values():
            slot.read(token_ids, valid)


def repeated(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a model, by name: what its outermost lists of modules hold."""
    lists: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists.append(name)
            yield from ((f"{name}.{key}", child) for key, child in module.named_children())


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    digest = hashlib.sha256(text.encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        yield
