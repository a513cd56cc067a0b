"""GPT-2 as transformers has it, random and tiny, with sparse layers put in from outside.

B sequences, L positions, D width.
"""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_base import BASE, DropIn, Experts, Router, SparseLayer, Switch

WIDTH, VOCABULARY = 32, 64


def sparse(router: Router, *, residual: bool = True, sublayers: int = 1) -> DropIn:
    """A layer of ``router`` and experts to match, two sequences to a routing group."""
    experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=64, sublayers=sublayers)
    return DropIn(SparseLayer(router, experts, routing_group=2, residual=residual))


def plain_gpt2() -> GPT2LMHeadModel:
    """Two blocks, random weights from seed 0, no dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **tokens))


def gpt2_with_experts(in_place_of_the_mlp: Router | None = None) -> GPT2LMHeadModel:
    """Experts instead of the second block's MLP, and a BASE layer of three sublayers on top, as in the paper."""
    model = plain_gpt2()
    if in_place_of_the_mlp is None:
        in_place_of_the_mlp = Switch(num_experts=4, width=WIDTH, capacity_factor=2.0)
    # The block adds the residual by itself.
    model.transformer.h[1].mlp = sparse(in_place_of_the_mlp, residual=False)
    top = sparse(BASE(num_experts=8, width=WIDTH), sublayers=3)
    model.transformer.ln_f = nn.Sequential(top, model.transformer.ln_f)
    return model


def text(sequences: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    """Sentences that can be learnt: each counts up in steps of its own. Ids from 1, [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (sequences, 1), generator=generator)
    step = torch.randint(1, 4, (sequences, 1), generator=generator)
    return 1 + (start + step * torch.arange(length)) % (VOCABULARY - 1)
