"""A step taken apart, by hand and in a real fit. W ranks."""

from pathlib import Path
from typing import Any

import program
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_base.callbacks.clock import TrainingClock
from lightning_base.callbacks.metrics_csv import MetricsCsv
from lightning_base.callbacks.step_time import PHASES, StepTime, decompose
from lightning_base.module import LanguageModel


def test_one_rank_by_hand() -> None:
    # Of a step of 100 ms, 60 are forward; of these 30 in the sparse layers, of whose router 8 in the solver.
    seconds = {
        "router": [0.010],
        "assignment": [0.008],
        "dispatch": [0.003],
        "experts": [0.015],
        "combine": [0.002],
        "forward": [0.060],
        "local": [0.060],
        "step": [0.100],
    }
    expected = {
        "router": 0.002,
        "assignment": 0.008,
        "dispatch": 0.003,
        "experts": 0.015,
        "combine": 0.002,
        "other_forward": 0.030,
        "waiting": 0.0,
        "backward_and_optimizer": 0.040,
    }
    found = decompose({name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()})
    assert {phase: found[phase] for phase in PHASES} == pytest.approx(expected, abs=1e-12)
    assert found["share_other_forward"] == pytest.approx(0.3)
    assert found["idle_fraction"] == pytest.approx(0, abs=1e-12)


def test_two_ranks_by_hand() -> None:
    # Rank 1 computes three times as long in its experts and reaches the backward pass 40 ms later; rank 0 waits for it
    # there, so that both take 100 ms: on the mean 20 of rank 0's 70 and rank 1's 30 are waiting.
    seconds = {
        "router": [0.004, 0.004],
        "assignment": [0.0, 0.0],
        "dispatch": [0.001, 0.001],
        "experts": [0.020, 0.060],
        "combine": [0.001, 0.001],
        "forward": [0.030, 0.070],
        "local": [0.030, 0.070],
        "step": [0.100, 0.100],
    }
    found = decompose({name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()})
    assert found["waiting"] == pytest.approx(0.020)
    assert found["backward_and_optimizer"] == pytest.approx(0.030)
    assert found["experts"] == pytest.approx(0.040)
    assert found["other_forward"] == pytest.approx(0.050 - 0.046)
    assert found["idle_fraction"] == pytest.approx(1 - 0.040 / 0.060)
    assert sum(found[phase] for phase in PHASES) == pytest.approx(0.100)
    assert sum(found[f"share_{phase}"] for phase in PHASES) == pytest.approx(1)


class Slow(pl.Callback):
    """Sleeps, on a clock that only it moves: in the experts, in the first layer, and in the backward pass."""

    def __init__(self) -> None:
        self.time = 0.0

    def perf_counter(self) -> float:
        return self.time

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LanguageModel)
        (layer,) = pl_module.model.sparse_layers.values()
        layer.router.register_forward_pre_hook(lambda *_: self.sleep(1))
        layer.experts.register_forward_pre_hook(lambda *_: self.sleep(10))
        pl_module.model.embedding.register_forward_pre_hook(lambda *_: self.sleep(100))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sleep(1000)

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def module_of(checkpointed: bool) -> LanguageModel:
    return LanguageModel(
        router={"_target_": "lightning_base.routing.uniform.Uniform", "num_experts": 4},
        model={"width": 16, "depth": 1, "heads": 2, "ffn_width": 32},
        optimizer={
            "learning_rate": 0.01,
            "warmup_steps": 1,
            "schedule": "constant",
            "final_learning_rate": 0.01,
            "weight_decay": 0.0,
            "router_learning_rate_factor": 1.0,
            "betas": [0.9, 0.95],
        },
        max_steps=6,
        vocab_size=30,
        sequence_length=8,
        routing_group=2,
        seed=1,
        activation_checkpointing=checkpointed,
    )


def batches(count: int) -> DataLoader:
    """Each of 4 sequences of 8 tokens; their counts are of the step."""
    ids = torch.arange(count * 4 * 8).view(count, 4, 8) % 30
    whole: list[dict[str, Any]] = [
        {
            "input_ids": rows,
            "targets": rows.roll(-1, 1),
            "valid": torch.ones_like(rows, dtype=torch.bool),
            "document": torch.zeros_like(rows),
            "step_targets": torch.tensor(32),
            "targets_of_step": 32,
        }
        for rows in ids
    ]
    return DataLoader(whole, batch_size=None)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_phases_of_a_real_fit_are_charged_for_their_own_time_and_only_when_logged(
    parts: int, checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, module, clock = Slow(), module_of(checkpointed), TrainingClock(3)
    monkeypatch.setattr("lightning_base.moe.stopwatch.time.perf_counter", slow.perf_counter)
    trainer = pl.Trainer(
        max_steps=6,
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=3,
        accelerator="cpu",
        strategy=SingleDeviceStrategy(device="cpu"),
        accumulate_grad_batches=parts,
        callbacks=[clock, StepTime(3, clock), slow],
        logger=MetricsCsv(tmp_path / "metrics.csv", lambda: 0.0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, batches(6 * parts), batches(1))
    # Recomputed, the layer's router and experts are called again in the backward pass: another 11 s each time.
    again = 11 if checkpointed else 0
    expected = {
        "router": 1.0,
        "assignment": 0.0,
        "dispatch": 0.0,
        "experts": 10.0,
        "combine": 0.0,
        "other_forward": 100.0,
        "waiting": 0.0,
        "backward_and_optimizer": 1000.0 + again,
    }
    for phase, seconds in expected.items():
        found = program.series(tmp_path, f"train_time/{phase}")
        assert [step for step, _ in found] == [1, 3, 6]
        assert [value for _, value in found] == pytest.approx([parts * seconds] * 3), phase
        shares = [value for _, value in program.series(tmp_path, f"train_time/share_{phase}")]
        assert shares == pytest.approx([seconds / (1111 + again)] * 3)
    assert all(layer.stopwatch is None for layer in module.model.sparse_layers.values())
