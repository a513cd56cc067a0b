"""Language models of transformers with a few thousand parameters, random weights and no dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_base.huggingface.model import HuggingFaceModel
from lightning_base.model_options import HuggingFaceConfig, read_model
from lightning_base.routing import Dense, Router

VOCABULARY, WIDTH, LENGTH, GROUP = 100, 32, 12, 2
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SEQUENCES = 4


def by_hand(kind: str, seed: int = 3, **more: Any) -> PreTrainedModel:
    """A model as transformers builds it after ``torch.manual_seed``, with nothing of ours."""
    torch.manual_seed(seed)
    tokens: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": 64}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**{**tokens, **sizes, **dropout, **more}))
    given = {**tokens, **SIZES, "num_key_value_heads": 2, **more}
    return LlamaForCausalLM(LlamaConfig(**given)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**given))


def options(config: str | dict[str, Any], **more: Any) -> HuggingFaceConfig:
    """As the configuration has them under ``model``; the name of an architecture stands for the sizes above."""
    source = {"model_type": config, **SIZES} if config in ("gpt2", "llama", "qwen2") else config
    found = read_model({"library": "transformers", "config": source, **more})
    assert isinstance(found, HuggingFaceConfig)
    return found


def sparse(
    config: str | dict[str, Any],
    make_router: Callable[[], Router] = Dense,
    *,
    seed: int = 3,
    checkpoint_activations: bool = False,
    **more: Any,
) -> HuggingFaceModel:
    """The model with sparse layers, checked as a run checks it."""
    found = options(config, **more)
    found.check(make_router(), vocab_size=VOCABULARY, sequence_length=LENGTH, within_documents=True)
    return found.build(
        seed=seed,
        router_scale=1.0,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        make_router=make_router,
        routing_group=GROUP,
        checkpoint_activations=checkpoint_activations,
    )


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(seed))
