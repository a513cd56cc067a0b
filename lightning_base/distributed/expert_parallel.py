"""Experts over ranks: DDP or FSDP of all other parameters, and of each expert as few copies as there are groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_base.module import LanguageModel
from lightning_base.moe.exchange import Exchange
from lightning_base.routing.router import Router


class ExpertParallelStrategy(DDPStrategy):
    """W ranks as a mesh ("data", "expert") of W/P x P: the P ranks of a row share the experts and send tokens around.

    Every rank has text of its own. A layer of one expert is not shared but copied, so that the dense arm trains under
    the same strategy.

    Args:
        expert_group: P; None: all ranks. With 1, every rank holds all experts.
        shared: what becomes of parameters that are not experts: every rank holds them whole (``ddp``), or a slice of
            each, gathered where it is needed (``fsdp``). Routers are whole in any case: they are small, and whoever
            watches them reads their parameters.
        same_sizes: no rank ever has padding in training, so that a router that declares equal loads need not count.
        options: of DDPStrategy.

    Attributes:
        mesh: of the ranks, once the process group is there.
    """

    mesh: DeviceMesh

    def __init__(
        self,
        *,
        expert_group: int | None = None,
        shared: Literal["ddp", "fsdp"] = "ddp",
        same_sizes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.expert_group, self.shared, self.same_sizes = expert_group, shared, same_sizes
        self._copies: dict[nn.Parameter, dist.ProcessGroup] = {}
        self._reduces = True

    def setup_environment(self) -> None:
        super().setup_environment()
        self.mesh = self._make_mesh()

    def setup(self, trainer: pl.Trainer) -> None:
        # Before anything is moved to a device, which need not have room for all experts.
        self._shard_experts()
        super().setup(trainer)

    def configure_ddp(self) -> None:
        module = self._module
        if self.shared == "ddp":
            super().configure_ddp()
            return
        mesh = DeviceMesh.from_group(dist.group.WORLD, self.root_device.type)
        whole = set(self._copies)
        for block in module.model.blocks.values():
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(module.model, mesh=mesh, ignored_params=whole)
        sliced = {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
        module.held_with.update({p: dist.group.WORLD for n, p in module.named_parameters() if n in sliced})
        _leave_alone(module, sliced)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1:
                group["foreach"] = False  # one call for many tensors takes no mixture of these

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._reduces = False
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._reduces = True

    def post_backward(self, closure_loss: Tensor) -> None:
        """Sums the gradients of what DDP or FSDP leaves to us over the ranks that hold a copy.

        Let L_r be the loss of rank r. DDP averages: a shared parameter gets 1/W sum_r dL_r/dw over all W ranks, and
        losses are scaled so that this is the gradient of the whole step. The copy of an expert in row d of the mesh has
        computed the tokens of that row's P ranks, and the exchange has sent their gradients there: it holds
        sum_{r in d} dL_r/dw. The rows are all ranks, each once; so the sum over the "data" axis is sum_r dL_r/dw, and
        what is missing is 1/W, not one over the number of copies. A whole copy on each rank is the case P = 1.
        """
        super().post_backward(closure_loss)
        if not self._reduces:
            return
        pending = []
        for parameter, group in self._copies.items():
            if parameter.grad is not None:
                parameter.grad /= self.world_size
                if dist.get_world_size(group) > 1:
                    pending.append(dist.all_reduce(parameter.grad, group=group, async_op=True))
        for work in pending:
            work.wait()

    @property
    def _module(self) -> LanguageModel:
        assert isinstance(self.lightning_module, LanguageModel)
        return self.lightning_module

    def _make_mesh(self) -> DeviceMesh:
        ranks = torch.arange(self.world_size).view(-1, self.expert_group or self.world_size)
        # A group of torch's own making would wait for half an hour, whatever the time-out of the others.
        expert, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=self._timeout)
        data, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=self._timeout)
        return DeviceMesh.from_group(
            [data, expert], self.root_device.type, mesh=ranks, mesh_dim_names=("data", "expert")
        )

    def _shard_experts(self) -> None:
        """Keeps this rank's experts, once, and finds out which parameters are for us to reduce."""
        module = self._module
        data, expert = self.mesh.get_group("data"), self.mesh.get_group("expert")
        if not self._copies:
            for layer in module.model.sparse_layers.values():
                shares = dist.get_world_size(expert) > 1 and layer.router.num_experts > 1
                if shares:
                    layer.shard(Exchange(expert), same_sizes=self.same_sizes)
                    module.held_with.update(dict.fromkeys(layer.experts.parameters(), expert))
                if shares or self.shared == "fsdp":
                    self._copies.update(dict.fromkeys(layer.experts.parameters(), data if shares else dist.group.WORLD))
            if self.shared == "fsdp":
                routers = [part for part in module.modules() if isinstance(part, Router)]
                self._copies.update({p: dist.group.WORLD for router in routers for p in router.parameters()})
            names = {name for name, parameter in module.named_parameters() if parameter in self._copies}
            # Copies of the same experts start alike, like everything else: drawn from the seed.
            _leave_alone(module, names)


def _leave_alone(module: nn.Module, names: set[str]) -> None:
    """Parameters that neither DDP nor Lightning may broadcast, since ranks hold different ones."""
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted({*before, *names}))
