"""Sparse layers in a LightningModule that is not the harness's, its loads logged by the callback.

B sequences, L positions, n assignments per expert.
"""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from gpt2_with_experts import gpt2_with_experts, text
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_base import ExpertLoadLogger, SparseLayer, auxiliary_loss, end_step

MLP, TOP = "gpt2.transformer.h.1.mlp", "gpt2.transformer.ln_f.0"
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class TheirModule(pl.LightningModule):
    """What somebody has, and two lines more."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt2 = gpt2_with_experts()
        self.losses: list[float] = []

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = self.gpt2(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss + auxiliary_loss(self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        end_step(self)

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("validation_loss", self.gpt2(input_ids=ids, labels=ids).loss)

    def test_step(self, ids: Tensor, batch_idx: int) -> None:
        self.validation_step(ids, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def their_trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", **quiet, **options)


def count(module: TheirModule) -> dict[str, list[Counter[int]]]:
    """Tokens of each expert in every forward pass of each layer, counted one by one at the layers themselves."""
    found: dict[str, list[Counter[int]]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, SparseLayer):
            passes = found.setdefault(name.removesuffix(".layer"), [])
            layer.register_forward_hook(lambda _m, _i, out, p=passes: p.append(Counter(out[1].expert_index.tolist())))
    return found


def loader(batches: int, seed: int = 0) -> DataLoader[Tensor]:
    return DataLoader(text(8 * batches, seed=seed), batch_size=8)  # type: ignore[arg-type]


def rows_of(path: Path) -> dict[tuple[int, str, str], list[tuple[int, int]]]:
    """Demand and load of each expert by step, stage and layer."""
    found: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = (int(row["step"]), row["stage"], row["layer"])
            assert int(row["expert"]) == len(found.setdefault(key, []))
            found[key].append((int(row["demand"]), int(row["load"])))
    return found


def test_training_falls_and_loads_are_logged_in_a_few_lines(tmp_path: Path) -> None:
    module = TheirModule()
    counts = count(module)
    trainer = their_trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=[CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="tb", version="")],
        callbacks=[ExpertLoadLogger(str(tmp_path / "loads.csv"), log_every_n_steps=2)],
        log_every_n_steps=1,
    )
    # 2 epochs of 10 batches are 10 optimizer steps; a sanity check of 1 batch comes first, and must not count.
    trainer.fit(module, loader(10), loader(1, seed=9))
    assert trainer.global_step == 10
    assert sum(module.losses[-4:]) / 4 < sum(module.losses[:4]) / 4 - 0.3

    rows = rows_of(tmp_path / "loads.csv")
    trained = {(step, "train_step") for step in (1, 2, 4, 6, 8, 10)}
    validated = {(5, "validation_pass"), (10, "validation_pass")}
    assert set(rows) == {(*key, layer) for key in trained | validated for layer in (MLP, TOP)}
    # The order of the passes: the sanity check, 10 in training, validation, 10 in training, validation.
    training = [*range(1, 11), *range(12, 22)]
    for layer, experts in ((MLP, 4), (TOP, 8)):
        passes = counts[layer]
        assert len(passes) == 23
        for step, stage in trained:
            kept = passes[training[2 * step - 2]] + passes[training[2 * step - 1]]
            assert [load for _, load in rows[step, stage, layer]] == [kept[e] for e in range(experts)]
            # 2 micro batches of 8 sequences of 24 tokens.
            assert sum(demand for demand, _ in rows[step, stage, layer]) == 2 * 8 * 24
        for step, which in ((5, 11), (10, 22)):
            kept = passes[which]
            assert [load for _, load in rows[step, "validation_pass", layer]] == [kept[e] for e in range(experts)]
    assert {demand for step, stage in trained for demand, _ in rows[step, stage, TOP]} == {48}

    with open(tmp_path / "csv" / "metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row[f"train_step/max_vio/demand/{TOP}"]]
    assert [float(row[f"train_step/max_vio/demand/{TOP}"]) for row in logged] == [0.0] * 6
    for row, step in zip(logged, (1, 2, 4, 6, 8, 10), strict=True):
        demand = [n for n, _ in rows[step, "train_step", MLP]]
        assert float(row[f"train_step/max_vio/demand/{MLP}"]) == pytest.approx(max(demand) / 96 - 1)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert f"expert_load/train_step/{MLP}" in events.Tags()["histograms"]
    assert [e.step for e in events.Scalars("validation_pass/max_vio/load/max")] == [5, 10]
    assert f"validation_pass/max_vio/load/{MLP}" not in events.Tags()["scalars"]


def test_validation_between_two_micro_batches_is_not_part_of_the_step(tmp_path: Path) -> None:
    module = TheirModule()
    counts = count(module)
    trainer = their_trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        val_check_interval=3,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[ExpertLoadLogger(tmp_path / "loads.csv", log_every_n_steps=1)],
    )
    trainer.fit(module, loader(4), loader(1, seed=9))
    rows = rows_of(tmp_path / "loads.csv")
    # Passes: three in training, of which the third begins the second step, then validation, then the step's other half.
    for layer, experts in ((MLP, 4), (TOP, 8)):
        one, two, three, validation, four = counts[layer]
        for key, kept in (
            ((1, "train_step"), one + two),
            ((2, "train_step"), three + four),
            ((1, "validation_pass"), validation),
        ):
            assert [load for _, load in rows[*key, layer]] == [kept[e] for e in range(experts)], key


def test_a_test_pass_and_no_file(tmp_path: Path) -> None:
    module, logger = TheirModule(), CSVLogger(tmp_path, name="csv", version="")
    trainer = their_trainer(
        logger=logger,
        callbacks=[ExpertLoadLogger()],
    )
    trainer.test(module, loader(2), verbose=False)
    logger.save()
    with open(tmp_path / "csv" / "metrics.csv", newline="") as file:
        names = set(next(csv.reader(file)))
    assert {f"test_pass/gini/load/{MLP}", f"test_group/gini/demand/{TOP}", f"test_pass/drop_rate/{MLP}"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]


class Dense(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.linear(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_sparse_layers_is_told_what_is_missing() -> None:
    trainer = their_trainer(
        max_steps=1,
        logger=False,
        callbacks=[ExpertLoadLogger()],
    )
    with pytest.raises(ValueError, match=r"no routing plan in Dense: put its sparse layers into DropIn"):
        trainer.fit(Dense(), DataLoader(torch.zeros(4, 2)))  # type: ignore[arg-type]
