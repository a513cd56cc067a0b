"""A trained model as two plain files: ``model.safetensors``, its weights, and ``model.json``, how it is built."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lightning_base.instantiation import ConfigError
from lightning_base.module import LanguageModel
from lightning_base.program.build import build_module
from lightning_base.program.checkpoint import CheckpointError, VerifiedCheckpointIO, checkpoints, newest, step_of
from lightning_base.program.explain import BAD_INPUT
from lightning_base.program.read_config import read_config
from lightning_base.program.run_directory import RunDirectory, write_json

FOLDER, WEIGHTS, DESCRIPTION = "export", "model.safetensors", "model.json"


class ExportError(ValueError):
    """One sentence about why a model cannot be exported, or not be read back."""


def export(path: Path, checkpoint: Path | None = None, target: Path | None = None) -> Path:
    """Writes the model of a run, finished or not.

    Args:
        path: the run's directory.
        checkpoint: which one; the newest that is whole if None.
        target: the folder to write into; ``export`` in the run's directory if None.

    Returns:
        The folder.

    Raises:
        ExportError: there is no run, or no such checkpoint, or no room.
    """
    from safetensors.torch import save_file

    run = RunDirectory(path)
    if not run.config.is_file():
        raise ExportError(f"{path} is not a run: it has no .hydra/config.yaml")
    chosen = checkpoint or newest(run.checkpoints)
    if chosen is None:
        found = len(checkpoints(run.checkpoints))
        raise ExportError(f"{run.checkpoints} holds no checkpoint that is whole (of {found}): train the run again")
    target = target or path / FOLDER
    plain = yaml.safe_load(run.config.read_text())
    try:
        state = VerifiedCheckpointIO().load_checkpoint(chosen)["state_dict"]
        build(plain).load_state_dict(state)
        # Tensors that share memory are refused.
        tensors = {name: value.clone().contiguous() for name, value in state.items()}
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / f".{WEIGHTS}.{os.getpid()}"
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            os.replace(temporary, target / WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
        manifest = run.manifest()
        known = ("corpus_fingerprint", "batch_fingerprint", "initial_weights_fingerprint")
        code = ("git_commit", "packages", "sources")
        write_json(
            target / DESCRIPTION,
            {
                "config": plain,
                "step": step_of(chosen),
                "checkpoint": str(chosen),
                "sha256": digest,
                **{name: manifest[name] for name in (*known, *code) if name in manifest},
            },
        )
    except (CheckpointError, ConfigError) as error:
        raise ExportError(str(error)) from error
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ExportError(f"{path} cannot be exported to {target}: {' '.join(str(error).split())}") from error
    return target


def load(folder: Path, plugins: Sequence[str] = ()) -> LanguageModel:
    """The model of an export, in evaluation mode.

    ``model({"input_ids": ids, "valid": valid})`` gives logits [B, L, V] and the plan of each sparse layer, for ids
    [B, L] and valid [B, L], which is False for padding.

    Args:
        folder: with ``model.safetensors`` and ``model.json``.
        plugins: packages that the router may be of; those that the files name are not imported.

    Raises:
        ExportError: they are not there, not what was written, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        described = json.loads((folder / DESCRIPTION).read_text())
        if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != described["sha256"]:
            raise ExportError(f"{folder / WEIGHTS} is not what was written: its SHA-256 is not that of {DESCRIPTION}")
        module = build({**described["config"], "plugins": list(plugins)})
        # Assigned, so that the weights keep their precision.
        module.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except ConfigError as error:
        raise ExportError(f"{folder / DESCRIPTION} cannot be used by this version: {error}") from error
    except (OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        raise ExportError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error
    return module.eval()


def build(plain: dict[str, Any]) -> LanguageModel:
    """The model of a configuration, with nothing of the files and devices that training needed."""
    module = {**plain["module"], "initial_weights": None, "compile": False, "activation_checkpointing": False}
    return build_module(read_config({**plain, "module": module})).requires_grad_(False)


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; gives the exit code."""
    parser = Parser(prog="export", description="A trained model as two plain files.")
    parser.add_argument("run", type=Path, help="the directory of one run, e.g. runs/compare/router=base,seed=1")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint; the newest of the run by default")
    parser.add_argument("--output", type=Path, help="the folder to write into; export/ in the run by default")
    options = parser.parse_args(arguments)
    try:
        target = export(options.run, options.checkpoint, options.output)
        load(target, read_config(yaml.safe_load(RunDirectory(options.run).config.read_text())).plugins)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"exported: {target / WEIGHTS}\n          {DESCRIPTION} beside it; lightning_base.export.load reads both")
    return 0
