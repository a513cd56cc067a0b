"""What the configuration says under ``model``: our own transformer, or a model of ``transformers``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_base.huggingface.layers import sparse_names
from lightning_base.huggingface.model import HuggingFaceModel
from lightning_base.huggingface.source import check_weights, hidden_width, outline, read_config, weights_folder
from lightning_base.instantiation import ConfigError, check_arguments, require
from lightning_base.model import Transformer, initialize, sparse_positions
from lightning_base.moe.experts import Activation
from lightning_base.routing.router import Router
from lightning_base.sparse_model import SparseModel


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ABC):
    """What all models have."""

    split_width: bool = True
    router_norm: bool = True
    shuffle_tokens: bool | int = False

    def __post_init__(self) -> None:
        shuffle = isinstance(self.shuffle_tokens, bool) or self.shuffle_tokens >= 1
        accepted = "give true, false, or the number of sequences to shuffle among"
        require(shuffle, "model.shuffle_tokens", self.shuffle_tokens, accepted)

    @property
    @abstractmethod
    def router_width(self) -> int:
        """D, of the hidden states that routers see."""

    @abstractmethod
    def check(self, router: Router, *, vocab_size: int, sequence_length: int, within_documents: bool) -> None:
        """Raises ValueError if the model cannot be built with this router for this data."""

    @abstractmethod
    def build(self, *, seed: int, router_scale: float, **given: Any) -> SparseModel:
        """The model with its initial weights; ``given`` is what ``Transformer`` asks for besides these options."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelOptions):
    """Our own transformer; see ``Transformer`` for what the options mean."""

    width: int
    depth: int
    heads: int
    ffn_width: int
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Activation = "relu"
    placement: Literal["replace", "insert"] = "replace"
    sparse_layers: Literal["every_other"] | int | list[int] = "every_other"
    sublayers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("width", "depth", "heads", "ffn_width", "sublayers"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "give at least 1")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"it has to divide model.width={self.width}")
        if self.positions == "rotary":
            head = self.width // self.heads
            require(head % 2 == 0, "model.heads", self.heads, f"rotary positions need an even head width, not {head}")
        try:
            sparse_positions(self.sparse_layers, self.depth, self.placement)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def router_width(self) -> int:
        return self.width

    def check(self, router: Router, *, vocab_size: int, sequence_length: int, within_documents: bool) -> None:
        if self.width % 8:
            raise ConfigError(f"model.width={self.width} is no multiple of 8, which the grouped matmul needs")
        if self.split_width and self.ffn_width % router.top_k:
            raise ConfigError(
                f"model.ffn_width={self.ffn_width} cannot be split over router.top_k={router.top_k} experts "
                "(model.split_width=true): choose a multiple"
            )
        hidden_width = self.ffn_width // (router.top_k if self.split_width else 1)
        if hidden_width % 8:
            raise ConfigError(
                f"model.ffn_width={self.ffn_width} makes experts of width {hidden_width}, and the grouped matmul "
                "needs a multiple of 8: choose another width"
            )

    def build(self, *, seed: int, router_scale: float, **given: Any) -> Transformer:
        model = Transformer(**given, **asdict(self))
        initialize(model, seed, router_scale)
        return model


# What transformers calls layers that see what a mask lets them; windows are held against the sequence.
FULL_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(ModelOptions):
    """A causal language model of ``transformers``.

    Args:
        library: says so.
        config: a folder with ``config.json``, whose weights are loaded if it has some; or such a file alone; or
            ``model_type`` and what else is not to be as it is by default.
        layers: patterns over the names of modules, of which the outermost become sparse; or ``every_other``
            feed-forward.
        upcycle: experts start as copies of the feed-forward, which is the default where weights are loaded.
    """

    library: Literal["transformers"]
    config: str | dict[str, Any]
    layers: str | list[str] = "every_other"
    upcycle: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if weights_folder(self.config) is not None and self.upcycle is False:
            raise ConfigError(
                f"model.upcycle=false with the weights in model.config={self.config}: drawn experts would lose what "
                "its feed-forward layers learnt; leave it out, or give the config.json alone to draw everything"
            )

    @property
    def router_width(self) -> int:
        return int(read_config(self.config).hidden_size)

    @property
    def upcycles(self) -> bool:
        return weights_folder(self.config) is not None if self.upcycle is None else self.upcycle

    def check(self, router: Router, *, vocab_size: int, sequence_length: int, within_documents: bool) -> None:
        config = read_config(self.config, vocab_size)
        if config.vocab_size < vocab_size:
            raise ConfigError(
                f"data.vocab_size={vocab_size} exceeds the vocabulary of model.config, {config.vocab_size}: choose a "
                "smaller vocabulary of the data, or a model with a larger one"
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and sequence_length > positions:
            raise ConfigError(
                f"data.sequence_length={sequence_length} exceeds the {positions} positions of model.config: shorten it"
            )
        window = getattr(config, "sliding_window", None)
        if within_documents and window is not None and window < sequence_length:
            raise ConfigError(
                f"data.attend_across_documents=false with the attention window of model.config, {window}, below "
                f"data.sequence_length={sequence_length}: set it to true, or use shorter sequences"
            )
        others = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - FULL_ATTENTION)
        if within_documents and others:
            raise ConfigError(
                f"data.attend_across_documents=false with layers of model.config that take no mask "
                f"({', '.join(others)}): set it to true"
            )
        network = outline(config)
        sparse_names(network, self.layers, config.hidden_size)
        if (folder := weights_folder(self.config)) is not None:
            check_weights(folder, network)
        if router.top_k > 1 and self.split_width:
            self._check_split(hidden_width(config), router.top_k)

    def _check_split(self, found: tuple[str, int] | None, top_k: int) -> None:
        whole = "set model.split_width=false, so that a token costs k feed-forward layers"
        if self.upcycles:
            raise ConfigError(
                f"model.split_width=true with router.top_k={top_k}: a feed-forward layer cannot be copied into experts "
                f"1/k as wide; {whole}"
            )
        if found is None:
            raise ConfigError(
                f"model.split_width=true: how wide a feed-forward layer of model.config is, is unknown; {whole}"
            )
        if found[1] % top_k:
            raise ConfigError(
                f"model.config has {found[0]}={found[1]}, which cannot be split over router.top_k={top_k} experts "
                "(model.split_width=true): choose a multiple"
            )

    def build(self, *, seed: int, router_scale: float, **given: Any) -> HuggingFaceModel:
        del given["sequence_length"]  # which has been checked
        return HuggingFaceModel(
            read_config(self.config, given.pop("vocab_size")),
            weights_folder(self.config),
            layers=self.layers,
            upcycle=self.upcycles,
            split_width=self.split_width,
            router_norm=self.router_norm,
            shuffle_tokens=self.shuffle_tokens,
            seed=seed,
            router_scale=router_scale,
            **given,
        )


def read_model(node: object) -> ModelOptions:
    """The options of a model, checked by themselves.

    Raises:
        ConfigError: one sentence about the first mistake.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"model={node!r} should be a group of options")
    schema = HuggingFaceConfig if "library" in node else ModelConfig
    return schema(**check_arguments(node, schema, "model", hidden=set()))
