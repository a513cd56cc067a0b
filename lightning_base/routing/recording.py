"""Recordings of routing plans: what a run decided, kept by content, to be looked up by another run.

A group's plan is found by stage, step, layer and a hash of the group's token ids, and by nothing else: not by ranks,
micro batches or the order of groups, so that a recording of one rank can be replayed on four.

    <run>/plans/recording.json                         what was recorded, and every file with its size
    <run>/plans/<stage>/step_00000012.rank_0_of_2.npz  the groups one rank routed in one pass

Stages are ``train`` (a step is the number of optimizer steps done before the pass), ``validation``, ``final`` and
``final_<mode>``.

Shapes: A assignments, T tokens, G routing groups, E experts.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan

FOLDER = "plans"
INDEX = "recording.json"
DIGEST_BYTES = 16
# What a recording says of its router; evaluation_modes by name, each with whether it is causal.
FACTS = {"num_experts", "top_k", "asks_for_fewer", "causal", "evaluation_modes", "layers"}


@dataclass(frozen=True)
class GroupPlan:
    """What was decided about one routing group.

    Args:
        token_index: [A], which token of the group.
        expert_index: [A].
        weight: [A], float32.
        demand: [E], assignments that asked for each expert, before any drop.
        capacity: slots of one expert; None if nothing is ever dropped.
    """

    token_index: np.ndarray
    expert_index: np.ndarray
    weight: np.ndarray
    demand: np.ndarray
    capacity: int | None


# The groups of one pass by layer and by the hash of their token ids.
Pass = dict[str, dict[bytes, GroupPlan]]


def digest_groups(token_ids: Int64[Tensor, " T"], groups: RoutingGroups) -> list[bytes]:
    """The address of each group: a hash of its token ids in their order."""
    ids = token_ids.detach().cpu().numpy()
    parts = np.split(ids, np.cumsum(groups.sizes)[:-1]) if groups.sizes else []
    return [hashlib.blake2b(part.tobytes(), digest_size=DIGEST_BYTES).digest() for part in parts]


def split_plan(plan: RoutingPlan) -> list[GroupPlan]:
    """One plan per group, in the order of the groups; assignments keep their order within a group."""
    token_A, expert_A = plan.token_index.cpu().numpy(), plan.expert_index.cpu().numpy()
    weight_A = plan.weight.detach().float().cpu().numpy()
    group_A = plan.groups.index().numpy()[token_A]
    order = np.argsort(group_A, kind="stable")
    counts_G = np.bincount(group_A, minlength=len(plan.groups.sizes))
    ends_G = np.cumsum(counts_G)
    demand_GE = plan.group_demand.cpu().numpy()
    capacity_G = None if plan.capacity is None else plan.capacity.cpu().tolist()
    found = []
    for g, start in enumerate(plan.groups.starts()):
        own = order[ends_G[g] - counts_G[g] : ends_G[g]]
        slots = None if capacity_G is None else int(capacity_G[g])
        found.append(GroupPlan(token_A[own] - start, expert_A[own], weight_A[own], demand_GE[g], slots))
    return found


def step_name(step: int) -> str:
    """What the files of one pass begin with."""
    return f"step_{step:08d}"


def file_name(step: int, rank: int, world_size: int) -> str:
    """The file of one rank's part of one pass."""
    return f"{step_name(step)}.rank_{rank}_of_{world_size}.npz"


def write_pass(path: Path, layers: Pass) -> None:
    """Writes one rank's part of one pass, whole or not at all; a file of the same name is replaced."""
    arrays: dict[str, np.ndarray] = {}
    for layer, plans in layers.items():
        kept = list(plans.values())
        columns: dict[str, np.ndarray] = {
            "digest": np.frombuffer(b"".join(plans), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
            "count": np.array([len(plan.token_index) for plan in kept], dtype=np.int64),
            "capacity": np.array([-1 if p.capacity is None else p.capacity for p in kept], dtype=np.int64),
            "token_index": _joined([plan.token_index for plan in kept], np.int32),
            "expert_index": _joined([plan.expert_index for plan in kept], np.int32),
            "weight": _joined([plan.weight for plan in kept], np.float32),
            "demand": np.array([plan.demand for plan in kept], dtype=np.int32),
        }
        arrays.update({f"{layer}/{name}": column for name, column in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the names are not the options
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


# A layer asks after another for the same pass; validation comes between two steps of training.
@lru_cache(maxsize=4)
def read_pass(paths: tuple[Path, ...]) -> Pass:
    """The groups in the files of all ranks.

    Raises:
        ValueError: a file that cannot be read.
    """
    found: Pass = {}
    for path in paths:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"the recording {path} cannot be read ({error}): record the run again") from error
        for layer in {name.rpartition("/")[0] for name in arrays}:
            found.setdefault(layer, {}).update(
                _groups({name: arrays[f"{layer}/{name}"] for name in COLUMNS if f"{layer}/{name}" in arrays})
            )
    return found


COLUMNS = ("digest", "count", "capacity", "token_index", "expert_index", "weight", "demand")


def _groups(columns: Mapping[str, np.ndarray]) -> dict[bytes, GroupPlan]:
    ends_G = np.cumsum(columns["count"])
    found = {}
    for g, digest in enumerate(columns["digest"]):
        own = slice(int(ends_G[g] - columns["count"][g]), int(ends_G[g]))
        capacity = int(columns["capacity"][g])
        found[digest.tobytes()] = GroupPlan(
            columns["token_index"][own].astype(np.int64),
            columns["expert_index"][own].astype(np.int64),
            columns["weight"][own],
            columns["demand"][g].astype(np.int64),
            None if capacity < 0 else capacity,
        )
    return found


class Recording:
    """The plans of a finished run.

    Args:
        source: its run directory.

    Attributes:
        facts: what ``recording.json`` says of the router, see ``FACTS``.
        config: the configuration the source ran with.

    Raises:
        ValueError: the directory is missing, holds no finished run, recorded nothing, or lacks files.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        if not source.is_dir():
            raise ValueError(f"router.source={source} is not a directory: give the directory of a run that is done")
        status, manifest = _read_json(source / "status.json"), _read_json(source / "manifest.json")
        if not status or not isinstance(manifest.get("config"), dict):
            raise ValueError(f"router.source={source} is no run directory: give one with status.json and manifest.json")
        if status.get("state") != "done":
            raise ValueError(
                f"router.source={source} is {status.get('state')}, and only a run that is done can be replayed: "
                "repeat its command to finish it"
            )
        index = _read_json(source / FOLDER / INDEX)
        if not index:
            raise ValueError(
                f"router.source={source} recorded no plans: run it again, elsewhere, with trainer.record_plans=true"
            )
        self.config: dict[str, Any] = manifest["config"]
        self.facts: dict[str, Any] = index["router"]
        if set(self.facts) != FACTS or not isinstance(self.facts["evaluation_modes"], dict):
            raise ValueError(
                f"router.source={source} was recorded by another version of lightning_base, which says other things of "
                "its router: run it again, elsewhere, with trainer.record_plans=true"
            )
        self._files: dict[str, int] = index["files"]
        self._passes: dict[str, list[Path]] = {}
        for name in self._files:
            self._passes.setdefault(name.partition(".")[0], []).append(source / FOLDER / name)
        self._check_complete()

    def group(self, stages: Sequence[str], step: int, layer: str, digest: bytes) -> GroupPlan:
        """One group's plan in the first of ``stages`` that has it.

        Raises:
            LookupError: it was not recorded.
        """
        for stage in stages:
            paths = self._passes.get(f"{stage}/{step_name(step)}", [])
            found = read_pass(tuple(paths)).get(layer, {}).get(digest)
            if found is not None:
                return found
        raise LookupError(
            f"router.source={self.source} has no plan of {layer} for a routing group at step {step} "
            f"({' or '.join(stages)}): replay with the data, seed and number of steps of the source"
        )

    def _check_complete(self) -> None:
        trainer = self.config["trainer"]
        steps, every = int(trainer["max_steps"]), int(trainer["validate_every_n_steps"])
        ranks = int(trainer["devices"]) * int(trainer["num_nodes"])
        finals = ["final", *(f"final_{mode}" for mode in list(self.facts["evaluation_modes"])[1:])]
        passes = [("train", step) for step in range(steps)] + [(stage, steps) for stage in finals]
        passes += [("validation", step) for step in range(every, steps + 1, every)]
        wanted = [f"{stage}/{file_name(step, rank, ranks)}" for stage, step in passes for rank in range(ranks)]
        missing = [name for name in wanted if not self._is_whole(name)]
        if missing:
            raise ValueError(
                f"router.source={self.source} lacks {len(missing)} of {len(wanted)} files of its recording, first "
                f"{FOLDER}/{missing[0]}: restore them, or record the run again"
            )

    def _is_whole(self, name: str) -> bool:
        path = self.source / FOLDER / name
        return path.is_file() and path.stat().st_size == self._files.get(name)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
