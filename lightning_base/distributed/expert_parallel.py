"""Experts over ranks: DDP or FSDP of all other parameters, and of each expert as few copies as there are groups."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_base.module import LanguageModel
from lightning_base.moe.exchange import Exchange
from lightning_base.program.checkpoint import PARAMETER_NAMES, CheckpointError, SavesTogether, expert_part, load, verify
from lightning_base.routing.router import Router


class ExpertParallelStrategy(SavesTogether, DDPStrategy):
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
        mesh = DeviceMesh.from_group(self._world, self.root_device.type)
        copies = set(self._copies)
        for block in module.model.blocks.values():
            fully_shard(block, mesh=mesh, ignored_params=copies)
        # Again sliced after a forward pass, which a save may follow: there parameters are looked up.
        fully_shard(module.model, mesh=mesh, ignored_params=copies, reshard_after_forward=True)
        sliced = {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
        module.held_with.update({p: self._world for n, p in module.named_parameters() if n in sliced})
        _leave_alone(module, sliced)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self._separate_mixtures()

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
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # into the slices

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: whole(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super().optimizer_state(optimizer)
        by_index = {i: {key: whole(value) for key, value in moments.items()} for i, moments in state["state"].items()}
        # How this strategy computes is no part of what is saved.
        way = {key: optimizer.defaults[key] for key in ("foreach", "fused")}
        return {"param_groups": [{**group, **way} for group in state["param_groups"]], "state": by_index}

    def expert_parts(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        sharded = self._sharded
        if not sharded:
            return {}
        parameters = {name: checkpoint["state_dict"].pop(name).clone() for name in sharded}
        moments = {}
        for optimizer, names in zip(checkpoint["optimizer_states"], checkpoint[PARAMETER_NAMES], strict=True):
            for index in [i for i in optimizer["state"] if names[i] in parameters]:
                moments[names[index]] = {key: value.clone() for key, value in optimizer["state"].pop(index).items()}
        # The first row of the mesh has all experts; the others have copies.
        if self.mesh.get_local_rank("data"):
            return {}
        held = next(iter(sharded.values()))
        part = {"experts": [held.start, held.stop], "parameters": parameters, "moments": moments}
        return {expert_part(held): part}

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path, sharded = Path(checkpoint_path), self._sharded
        # Every file is read for its sum: once is enough.
        problem = self.broadcast(verify(path) if self.is_global_zero else None)
        if problem:
            raise CheckpointError(problem)
        return load(path, names=list(sharded), experts=next(iter(sharded.values()), None))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        now = dict(self._module.named_parameters())
        state = {name: slice_like(now.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        sliced = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            by_index = {
                i: {key: slice_like(parameters[i], value) for key, value in moments.items()}
                for i, moments in saved["state"].items()
            }
            sliced.append({**saved, "state": by_index})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": sliced})
        self._separate_mixtures()

    def _separate_mixtures(self) -> None:
        """Keeps torch from one call for many tensors where some are distributed and some are not."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1:
                group["foreach"] = group["fused"] = False

    @property
    def _sharded(self) -> dict[str, range]:
        """The parameters of sharded experts, by the names of the state dict, with the experts that are held here."""
        experts = self._module.expert_parameters.items()
        return {name: layer.experts.held for name, layer in experts if layer.exchange is not None}

    @property
    def _world(self) -> dist.ProcessGroup:
        assert dist.group.WORLD is not None
        return dist.group.WORLD

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
                    self._copies.update(dict.fromkeys(layer.experts.parameters(), data if shares else self._world))
            if self.shared == "fsdp":
                routers = [part for part in module.modules() if isinstance(part, Router)]
                self._copies.update({p: self._world for router in routers for p in router.parameters()})
            names = {name for name, parameter in module.named_parameters() if parameter in self._copies}
            # Copies of the same experts start alike, like everything else: drawn from the seed.
            _leave_alone(module, names)


def whole(value: Any) -> Any:
    """A distributed tensor gathered from all ranks, each of which has to ask; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def slice_like(parameter: nn.Parameter | None, value: Any) -> Any:
    """This rank's part of a whole tensor that belongs to a distributed parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # Every rank has read the whole.
    local = value.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _leave_alone(module: nn.Module, names: set[str]) -> None:
    """Parameters that neither DDP nor Lightning may broadcast, since ranks hold different ones."""
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted({*before, *names}))
