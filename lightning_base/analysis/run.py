"""A finished run, opened for analysis: its configuration, its data and its checkpoints, all checked first."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_base.data import TextDataModule
from lightning_base.instantiation import ConfigError
from lightning_base.module import LanguageModel
from lightning_base.program.build import build_data, build_module
from lightning_base.program.checkpoint import CheckpointError, VerifiedCheckpointIO, checkpoints, step_of, verify
from lightning_base.program.config import Config
from lightning_base.program.read_config import read_config
from lightning_base.program.run_directory import RunDirectory

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class AnalysisError(ValueError):
    """One sentence about why a run cannot be analysed."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done, and its checkpoints by step, the oldest first."""

    directory: RunDirectory
    config: Config
    manifest: dict[str, Any]
    checkpoints: dict[int, Path]
    causal: bool

    @property
    def name(self) -> str:
        """``experiment/job``."""
        path = self.directory.path.resolve()
        return f"{path.parent.name}/{path.name}"

    @property
    def router(self) -> str:
        """The router's class name."""
        return str(self.config.router["_target_"]).rpartition(".")[2]


def open_run(path: Path) -> FinishedRun:
    """Reads what a run left, and checks all of it before anything is computed.

    Raises:
        AnalysisError: not a run, not finished, without a whole checkpoint, or without any routing.
    """
    run = RunDirectory(path)
    state = state_of(run)
    if state != "done":
        raise AnalysisError(f"the run {path} is {state}, not done: finish it with the command that started it")
    try:
        config = read_config(yaml.safe_load(run.config.read_text()))
        manifest = run.manifest()
    except ConfigError as error:
        raise AnalysisError(f"the configuration of {path} cannot be used by this version: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AnalysisError(f"{path} cannot be read: {first_line(error)}") from error
    router = config.build_router()
    if router.num_experts < 2:
        raise AnalysisError(f"the run {path} has one expert per layer: there is no routing to analyse")
    if not router.any_text:
        raise AnalysisError(
            f"the run {path} repeats what another one has routed, router.source={config.router.get('source')}: "
            "analyse that one"
        )
    return FinishedRun(run, config, manifest, checkpoints_of(run), router.causal_in_evaluation)


def state_of(run: RunDirectory) -> str:
    """What status.json says.

    Raises:
        AnalysisError: this is not the directory of a run.
    """
    path = run.path
    if not path.is_dir():
        parent = path.parent
        names = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
        near = [str(parent / name) for name in difflib.get_close_matches(path.name, names, cutoff=0.5)]
        raise AnalysisError(f"{path} is not a directory" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        status = run.status()
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path / 'status.json'} cannot be read: {first_line(error)}") from error
    if status and run.config.is_file():
        return str(status.get("state"))
    runs = sorted(str(found.parent) for found in path.glob("*/status.json"))
    if runs:
        raise AnalysisError(f"{path} holds several runs, and one at a time is analysed: give {' or '.join(runs)}")
    raise AnalysisError(
        f"{path} is not a run: it has no status.json with a .hydra/config.yaml; give a folder like "
        "runs/compare/router=base"
    )


def checkpoints_of(run: RunDirectory) -> dict[int, Path]:
    """All checkpoints by step, each held against its checksum.

    Raises:
        AnalysisError: there is none, or one is damaged.
    """
    found = {step_of(path): path for path in checkpoints(run.checkpoints)}
    if not found:
        raise AnalysisError(f"{run.checkpoints} holds no checkpoint: train the run again, and keep at least one")
    for path in found.values():
        problem = verify(path)
        if problem:
            others = "; without it, the others can be analysed" if len(found) > 1 else ""
            raise AnalysisError(problem + others)
    return dict(sorted(found.items()))


def open_data(run: FinishedRun, sequences: int | None) -> TextDataModule:
    """The validation text of a run, ready to be read in batches of a size that training could hold.

    Args:
        run: whose data.
        sequences: how many validation sequences, spread evenly over the split; None is all of them.

    Raises:
        AnalysisError: the corpus is no longer the one the run was trained on.
        ValueError: the corpus cannot be read, in one sentence.
    """
    config = run.config
    parts = config.trainer.world_size * config.trainer.accumulate_grad_batches
    options = replace(config.data, global_batch=config.data.global_batch // parts, validation_sequences=sequences)
    alone = replace(config.trainer, accumulate_grad_batches=1)
    data = build_data(replace(config, data=options, trainer=alone))
    data.prepare_data()
    data.setup()
    assert data.prepared is not None
    if data.prepared.fingerprint != run.manifest.get("corpus_fingerprint"):
        raise AnalysisError(
            f"the corpus is not the one that {run.directory.path} was trained on: its files or the Python version "
            "have changed since"
        )
    return data


def open_model(run: FinishedRun) -> LanguageModel:
    """The model of a run in evaluation mode, with initial weights."""
    plain = replace(run.config.module, compile=False, activation_checkpointing=False)
    module = build_module(replace(run.config, module=plain))
    use_gpu = torch.cuda.is_available() and run.config.trainer.accelerator != "cpu"
    return module.to("cuda" if use_gpu else "cpu").eval()


def load_weights(module: LanguageModel, path: Path, precision: str) -> None:
    """Puts the weights and the routers' state of a checkpoint into the model, all of it and nothing else.

    Raises:
        AnalysisError: the checkpoint is damaged or belongs to another model.
    """
    try:
        state = VerifiedCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]
        module.load_state_dict(state, strict=True)
    except CheckpointError as error:
        raise AnalysisError(str(error)) from error
    except (KeyError, RuntimeError) as error:
        raise AnalysisError(
            f"the checkpoint {path} does not fit the model of this version: {' '.join(str(error).split())}"
        ) from error
    if precision == "bf16-true":
        module.to(torch.bfloat16)


def autocast(module: LanguageModel, precision: str) -> torch.autocast:
    """The precision in which the run computed; a CPU computes in full precision what a GPU did in float16."""
    device = module.device.type
    dtype = MIXED.get(precision)
    enabled = dtype is not None and not (device == "cpu" and dtype == torch.float16)
    return torch.autocast(device, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
