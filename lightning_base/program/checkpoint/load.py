"""From the parts of a checkpoint to what Lightning takes, with all experts or some of them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lightning_base.program.checkpoint.files import STATE, CheckpointError, read_facts

# The names of the parameters of each optimizer, in the order in which its state counts them.
PARAMETER_NAMES = "parameter_names"


def expert_part(experts: range) -> str:
    """The name of the file that holds some experts.

    >>> expert_part(range(4, 8))
    'experts_4-8.pt'
    """
    return f"experts_{experts.start}-{experts.stop}.pt"


def load(
    path: Path, names: Collection[str] = (), experts: range | None = None, *, device: str = "cpu"
) -> dict[str, Any]:
    """Lightning's checkpoint as one process would have saved it, or with some of the experts alone.

    Files are mapped, so that of experts nothing but what is asked for is read into memory.

    Args:
        path: the checkpoint, which is not verified here.
        names: of the parameters, in the state dict, whose first dimension is the expert. Needed with ``experts``.
        experts: which of them to keep, of parameters and of what the optimizer knows of them; None keeps all.
        device: of all tensors; on ``meta`` they have shapes alone, and no number is read.

    Raises:
        CheckpointError: it cannot be read, or its parts do not belong together.
    """
    try:
        state: dict[str, Any] = _load_part(path / STATE, device)
        parts = [_load_part(path / Path(name).name, device) for name in read_facts(path)["parts"] if name != STATE]
        _insert_experts(state, sorted(parts, key=lambda part: part["experts"][0]), experts)
        if experts is not None:
            _keep_rows(state, set(names) - {name for part in parts for name in part["parameters"]}, experts)
        for optimizer in state.get("optimizer_states", []):
            for moments in optimizer["state"].values():
                moments.update({k: v.clone() for k, v in moments.items() if isinstance(v, torch.Tensor)})
    except CheckpointError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        raise CheckpointError(f"the checkpoint {path} cannot be loaded ({type(error).__name__}: {why})") from error
    return state


def _load_part(path: Path, device: str) -> Any:
    return torch.load(path, map_location=device, weights_only=True, mmap=True)


def _insert_experts(state: dict[str, Any], parts: list[dict[str, Any]], experts: range | None) -> None:
    """Puts the experts of all parts back to where one process would have saved them."""
    if not parts:
        return
    starts, stops = ([part["experts"][end] for part in parts] for end in (0, 1))
    if starts != [0, *stops[:-1]]:
        held = ", ".join(f"{start} to {stop}" for start, stop in zip(starts, stops, strict=True))
        raise CheckpointError(f"the parts of a checkpoint hold experts {held}: with gaps, or twice")
    wanted = range(stops[-1]) if experts is None else experts

    def joined(found: list[Any]) -> Any:
        if not isinstance(found[0], torch.Tensor) or not found[0].ndim:
            return found[0]
        pairs = zip(starts, found, strict=True)
        return torch.cat([held[max(wanted.start - start, 0) : max(wanted.stop - start, 0)] for start, held in pairs])

    optimizers = zip(state.get("optimizer_states", []), state.get(PARAMETER_NAMES, []), strict=False)
    places = {name: (optimizer, i) for optimizer, names in optimizers for i, name in enumerate(names)}
    for name in parts[0]["parameters"]:
        state["state_dict"][name] = joined([part["parameters"][name] for part in parts])
    for name, moments in parts[0]["moments"].items():
        optimizer, index = places[name]
        optimizer["state"][index] = {key: joined([part["moments"][name][key] for part in parts]) for key in moments}


def _keep_rows(state: dict[str, Any], names: Collection[str], experts: range) -> None:
    """Leaves of some parameters, and of their moments, the rows of some experts."""

    def rows(value: Any) -> Any:
        by_expert = isinstance(value, torch.Tensor) and value.ndim
        return value[experts.start : experts.stop].clone() if by_expert else value

    state["state_dict"].update({name: rows(state["state_dict"][name]) for name in names})
    for optimizer, listed in zip(state.get("optimizer_states", []), state.get(PARAMETER_NAMES, []), strict=False):
        for index, name in enumerate(listed):
            if name in names and index in optimizer["state"]:
                optimizer["state"][index] = {key: rows(value) for key, value in optimizer["state"][index].items()}
