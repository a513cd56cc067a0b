"""TensorBoard's HParams table: what tells runs apart, and what came of it."""

import csv
import inspect
import statistics
import typing
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from lightning_base import routing
from lightning_base.callbacks.tensorboard import card
from lightning_base.program.config import Config
from lightning_base.program.run_directory import RunDirectory

# The first five are shown before anybody ticks a box.
METRICS = {
    "result/loss": "validation loss",
    "result/max_vio_training": "max_vio in training",
    "result/max_vio_evaluation": "max_vio in evaluation",
    "result/drop_rate": "dropped in training",
    "result/tokens_per_second": "tokens/s",
    "result/bits_per_byte": "bits per byte",
}
SHOWN = ("arm", "causal", "num_experts", "options", "top_k")
END = ("batch_fingerprint", "steps", "sequences", "tokens", "assignments", "assignments_dropped", "training_seconds")


def show_result(logger: TensorBoardLogger, config: Config, run: RunDirectory) -> None:
    """Writes the row of a finished run into the HParams table, and the text card ``result``.

    TensorBoard takes the columns of the table from whichever run it reads first, and drops what they lack. So every run
    names the options of all routers.

    Args:
        logger: of the run.
        config: of the run.
        run: with its manifest and its metrics.csv.
    """
    manifest, given, found = run.manifest(), hyperparameters(config), results(run)
    writer = logger.experiment
    for name, value in found.items():
        writer.add_scalar(name, value, manifest["steps"])
    writer.add_text("result", card({name: manifest[name] for name in END} | manifest["result"]), manifest["steps"])
    _, start, end = hparams(given, found)
    for summary in (columns(given), start, end):
        writer.file_writer.add_summary(summary)
    # The process may be gone before the writer would do so by itself.
    writer.flush()


def hyperparameters(config: Config) -> dict[str, Any]:
    """What tells runs apart; an option of a router's is a number or text, and left out where it is null."""
    router = config.build_router()
    own = {k: v for k, v in config.router.items() if k not in ("_target_", "num_experts", "top_k")}
    options = {f"router.{k}": v if type(v) in (int, float) else str(v) for k, v in own.items() if v is not None}
    return {
        "arm": type(router).__name__,
        # A loss that was measured with a view of later tokens does not compare.
        "causal": "yes" if router.causal else "in evaluation" if router.causal_in_evaluation else "no",
        "num_experts": router.num_experts,
        "options": ", ".join(f"{key}={value}" for key, value in own.items()),
        "top_k": router.top_k,
        "seed": config.seed,
        "max_steps": config.trainer.max_steps,
        "learning_rate": config.module.learning_rate,
        **options,
    }


def results(run: RunDirectory) -> dict[str, float]:
    """The figures of the table: losses and loads of the final evaluation; of training what the report shows.

    Loads are what the router asked for, a mean over layers, in training also over logged steps; with one expert there
    is nothing to balance. The speed is the median over the logged intervals after the first.
    """
    training, evaluation, speed = (
        "train_group/max_vio/demand/mean",
        "final_pass/max_vio/demand/mean",
        "train/tokens_per_second",
    )
    series: dict[str, list[float]] = {training: [], evaluation: [], speed: []}
    with open(run.path / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["name"] in series:
                series[row["name"]].append(float(row["value"]))
    manifest = run.manifest()
    found = {
        "loss": manifest["result"]["final/loss"],
        "max_vio_training": statistics.fmean(series[training]),
        "max_vio_evaluation": series[evaluation][-1],
        "drop_rate": manifest["assignments_dropped"] / manifest["assignments"],
        "tokens_per_second": statistics.median(series[speed][1:] or series[speed]),
    }
    if "final/bits_per_byte" in manifest["result"]:  # else nobody knows what the tokens stand for
        found["bits_per_byte"] = manifest["result"]["final/bits_per_byte"]
    balanced = manifest["ledger"]["num_experts"] > 1
    return {f"result/{name}": value for name, value in found.items() if balanced or "max_vio" not in name}


def columns(given: dict[str, Any]) -> Summary:
    """The columns of the table: the same in every run, and those of this one's options that no router here has."""
    numbers = {name: isinstance(value, int | float) for name, value in given.items()}
    columns = {**router_options(), **numbers}
    experiment = Experiment(
        hparam_infos=[
            # Those that differ come first, by name, and the first five are shown.
            HParamInfo(name=name, type=DATA_TYPE_FLOAT64 if number else DATA_TYPE_STRING, differs=name in SHOWN)
            for name, number in sorted(columns.items())
        ],
        metric_infos=[
            MetricInfo(name=MetricName(tag=tag), display_name=display_name) for tag, display_name in METRICS.items()
        ],
    )
    data = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
    return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=data, tensor=metadata.NULL_TENSOR)])


def router_options() -> dict[str, bool]:
    """The options of all routers, and whether each is a number."""
    found = {}
    for router in vars(routing).values():
        if inspect.isclass(router) and issubclass(router, routing.Router):
            hints = typing.get_type_hints(router.__init__)
            for name in inspect.signature(router).parameters.keys() - {"num_experts", "top_k", "width", "vocab_size"}:
                kinds = (hints[name], *typing.get_args(hints[name]))
                found[f"router.{name}"] = int in kinds or float in kinds
    return found
