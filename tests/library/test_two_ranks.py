"""DistributedDataParallel around sparse layers on two processes, against one process with all sequences."""

from pathlib import Path

import forks
import torch
from tiny_training import leave
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_base import BASE, DropIn, Experts, LossFree, SparseLayer, Switch, auxiliary_loss, drop_ins, end_step

WIDTH = 16


def model() -> nn.Sequential:
    """Routers that remember a step, and a loss that balances a whole step."""
    torch.manual_seed(0)
    routers = (
        BASE(num_experts=4, width=WIDTH),
        LossFree(num_experts=4, width=WIDTH),
        Switch(num_experts=4, width=WIDTH, balance_scope="step"),
    )
    layers = []
    for router in routers:
        experts = Experts(num_experts=4, width=WIDTH, hidden_width=24)
        nn.init.normal_(experts.w2[0], std=0.3)
        layers.append(DropIn(SparseLayer(router, experts, routing_group=2)))
    return nn.Sequential(*layers)


def steps(trained: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Three steps; what the model is after them, and the auxiliary losses."""
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    losses = []
    for hidden in batches:
        output = trained(hidden)
        loss = auxiliary_loss(trained)
        (output.square().mean() + loss).backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        end_step(trained)
    state = {name.removeprefix("module."): value for name, value in trained.state_dict().items()}
    return {**state, "losses": torch.stack(losses)}


def batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 6, WIDTH, generator=torch.Generator().manual_seed(1)))


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model())
    assert list(drop_ins(wrapped)) == ["module.0", "module.1", "module.2"]
    torch.save(steps(wrapped, [batch.chunk(2)[rank] for batch in batches()]), Path(folder, f"{rank}.pt"))
    leave()


def test_two_ranks_are_one_process_with_all_sequences(tmp_path: Path) -> None:
    forks.call_on_two_ranks(on_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = steps(model(), batches())
    assert bool(alone["0.layer.router.prices"].any())
    assert bool(alone["1.layer.router.bias_steps"].any())
    # Each rank has its part of the loss, scaled so that the mean over ranks, which DDP takes, is the whole.
    torch.testing.assert_close((ranks[0].pop("losses") + ranks[1].pop("losses")) / 2, alone.pop("losses"))
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
