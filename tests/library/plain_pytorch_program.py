"""What somebody with nothing but the installed package writes: prints, as JSON, what it saw.

A language model of their own with experts in place of its feed-forward layer and a BASE layer on top, trained on
sentences that count upwards.
"""

import json
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_base
from lightning_base import BASE, DropIn, Experts, SparseLayer, Switch, auxiliary_loss, drop_ins, end_step

WIDTH, VOCABULARY = 32, 50


class TheirModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        experts = Experts(num_experts=4, width=WIDTH, hidden_width=64)
        self.mlp = DropIn(SparseLayer(Switch(num_experts=4, width=WIDTH), experts, routing_group=4))
        stacks = Experts(num_experts=8, width=WIDTH, hidden_width=64, sublayers=3)
        self.top = DropIn(SparseLayer(BASE(num_experts=8, width=WIDTH), stacks, routing_group=4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.top(self.mlp(self.mix(self.embedding(ids))[0])))


def main() -> None:
    torch.manual_seed(0)
    model = TheirModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        start, step = torch.randint(0, 40, (8, 1)), torch.randint(1, 4, (8, 1))
        ids = (start + step * torch.arange(17)) % VOCABULARY
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)
        losses.append(loss.item())
    top = drop_ins(model)["top"].plan
    assert top is not None
    seen = {
        "file": lightning_base.__file__,
        "losses": losses,
        "loads": top.group_load.tolist(),
        "imported": sorted({name.partition(".")[0] for name in sys.modules}),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
