"""Weights & Biases and MLflow as Lightning has them, without a network: ``logger=wandb``, ``logger=mlflow``.

Neither is imported unless it is asked for.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger

from lightning_base.distributed.reduction import rank_of_this_process
from lightning_base.program.config import Config


def offline_loggers(config: Config, directory: Path, plain: dict[str, Any]) -> list[Logger]:
    """The loggers that a configuration asks for beside TensorBoard and metrics.csv.

    Args:
        config: of the run.
        directory: of the run.
        plain: the configuration as it was composed, which both keep.
    """
    found: list[Logger] = []
    # Neither waits for an account, or sends home how it is used.
    if config.logger.wandb:
        os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
        found.append(wandb_logger(config, directory))
    if config.logger.mlflow:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        found.append(mlflow_logger(config, directory))
    for logger in found:
        logger.log_hyperparams(plain)
    return found


def wandb_logger(config: Config, directory: Path) -> Logger:
    """Writes ``<run>/wandb/offline-run-*``, which ``wandb sync`` uploads.

    A run that resumes leaves another such folder with the same id, which the server puts together.
    """
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    # Its own progress lines and its copy of the terminal would go between ours.
    quiet = {"console": "off", "silent": True}
    return WandbLogger(
        project=config.name, name=directory.name, version=name, save_dir=directory, offline=True, settings=quiet
    )


def mlflow_logger(config: Config, directory: Path) -> Logger:
    """Writes ``<runs_dir>/mlflow.db``, which ``mlflow ui --backend-store-uri sqlite:///...`` shows.

    A run that resumes goes on with the run of the database it began, whose id ``mlflow_run_id`` keeps.
    """
    store = Path(config.runs_dir).absolute() / "mlflow.db"
    kept = directory / "mlflow_run_id"
    logger = MLFlowLogger(
        experiment_name=config.name,
        run_name=directory.name,
        tracking_uri=f"sqlite:///{store}",
        artifact_location=directory.parent.as_uri(),
        run_id=kept.read_text() if kept.exists() else None,
    )
    if rank_of_this_process() == 0:
        kept.write_text(str(logger.run_id))
    return logger


def finish_loggers() -> None:
    """Lets Weights & Biases write what it still holds back; a rank leaves without the interpreter's own end."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
