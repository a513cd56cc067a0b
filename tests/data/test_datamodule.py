import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from synthetic_corpora import ListCorpus, make_documents

from lightning_base.data import Corpus, CorpusError, TextDataModule

CONF = Path(__file__).parents[2] / "conf" / "data"


def data(tmp_path: Path, **changes: Any) -> TextDataModule:
    arguments = {
        "corpus": ListCorpus(make_documents(120)),
        "sequence_length": 16,
        "global_batch": 8,
        "routing_group": 2,
        "vocab_size": 300,
        "validation_fraction": 0.2,
        "validation_sequences": 10,
        "cache_dir": str(tmp_path),
        "seed": 1,
        "num_steps": 6,
    }
    return TextDataModule(**(arguments | changes))


def opened(module: TextDataModule) -> TextDataModule:
    module.prepare_data()
    module.setup("fit")
    return module


def ranks(tmp_path: Path, world_size: int, **changes: Any) -> list[TextDataModule]:
    """The same data as every rank of a run sees it; only the first has prepared it."""
    first = data(tmp_path, **changes)
    first.prepare_data()
    assert first.prepared is not None
    name = first.prepared.folder.name
    modules = [first, *(data(tmp_path, **changes) for _ in range(world_size - 1))]
    for rank, module in enumerate(modules):
        strategy = SimpleNamespace(broadcast=lambda _: name)
        module.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=strategy)
        module.setup("fit")
    return modules


def test_batches_have_the_promised_shapes(tmp_path: Path) -> None:
    module = opened(data(tmp_path, accumulation=2))
    batches = list(module.train_dataloader())
    assert len(batches) == len(module.train_dataloader()) == 12
    kinds = {"input_ids": torch.int64, "targets": torch.int64, "valid": torch.bool, "document": torch.int64}
    for batch in batches:
        assert {name: (batch[name].shape, batch[name].dtype) for name in kinds} == {
            name: ((4, 16), kind) for name, kind in kinds.items()
        }
        assert batch["step_targets"] == 8 * 16
    for batch in module.val_dataloader():
        assert set(batch) == set(kinds)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_every_validation_token_is_a_target_exactly_once(tmp_path: Path, world_size: int, packing: str) -> None:
    modules = ranks(tmp_path, world_size, packing=packing, global_batch=12)
    loaders = [list(module.test_dataloader()) for module in modules]
    assert len({len(batches) for batches in loaders}) == 1
    targets = [batch["targets"] for batches in zip(*loaders, strict=True) for batch in batches]
    assert {tuple(batch.shape) for batch in targets} == {(12 // world_size, 16)}
    found = torch.cat(targets).flatten()
    prepared = modules[0].prepared
    assert prepared is not None
    # In order, too: batch by batch and rank by rank this is the validation split itself.
    assert found[found != -100].tolist() == prepared.validation.tokens.tolist()


def test_periodic_validation_looks_at_as_many_sequences_as_asked_for(tmp_path: Path) -> None:
    for wanted, expected in ((10, 10), (1, 1)):
        module = opened(data(tmp_path, validation_sequences=wanted))
        assert sum(int(batch["valid"].any(1).sum()) for batch in module.val_dataloader()) == expected
    everything = opened(data(tmp_path, validation_sequences=None))
    assert len(everything.val_dataloader()) == len(everything.test_dataloader())


def test_without_attention_across_documents_fewer_targets_are_counted(tmp_path: Path) -> None:
    module = opened(data(tmp_path, attend_across_documents=False))
    counted = [int(batch["step_targets"]) for batch in module.train_dataloader()]
    assert counted == [int((batch["targets"] != -100).sum()) for batch in module.train_dataloader()]
    assert min(counted) < max(counted) <= 8 * 16


class Recorder(pl.LightningModule):
    """Keeps what it is given, and saves a checkpoint after every batch if it is told where."""

    def __init__(self, checkpoints: Path | None = None) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].clone())
        return self.weight * 1.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.checkpoints:
            self.trainer.save_checkpoint(self.checkpoints / f"{batch_idx}.ckpt")

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=1,
    )


# Lightning 2.6.6 uses a name that torch 2.13 renames.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_resumes_in_the_middle_and_sees_exactly_the_rest(tmp_path: Path) -> None:
    module = data(tmp_path / "cache", accumulation=2)
    whole = Recorder(checkpoints=tmp_path)
    trainer(tmp_path).fit(whole, module)
    assert len(whole.seen) == 12
    for step in (1, 2, 3, 5):
        rest = Recorder()
        run = trainer(tmp_path)
        # A new module: the place comes from the checkpoint and from nothing else.
        fresh = data(tmp_path / "cache", accumulation=2)
        run.fit(rest, fresh, ckpt_path=str(tmp_path / f"{2 * step - 1}.ckpt"), weights_only=True)
        assert run.global_step == 6
        assert len(rest.seen) == 12 - 2 * step
        assert torch.equal(torch.stack(rest.seen), torch.stack(whole.seen[2 * step :]))


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.global_batch=9 cannot be divided by .* = 1 x 1 x 2: .* multiple of 2"):
        data(tmp_path, global_batch=9)
    with pytest.raises(ValueError, match=r"data\.packing=tight is not a way of packing"):
        data(tmp_path, packing="tight")
    with pytest.raises(ValueError, match=r"data\.global_batch=8 cannot be divided by .* = 3 x 1 x 2"):
        ranks(tmp_path, 3)


def test_a_corpus_too_small_for_one_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"^data\.corpus is too small: it makes \d+ training .* data\.global_batch=512"
    ):
        data(tmp_path, global_batch=512).prepare_data()
    with pytest.raises(
        CorpusError, match=r"^data\.corpus is too small: data\.validation_fraction=0\.001 leaves \d+ tokens"
    ):
        data(tmp_path, validation_fraction=0.001, sequence_length=400).prepare_data()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_conf_data_makes_a_data_module(path: Path) -> None:
    config = OmegaConf.load(path)
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "given")
    given = OmegaConf.to_container(config, resolve=True)
    assert isinstance(given, dict)
    node = given.pop("corpus")
    home, _, name = node.pop("_target_").rpartition(".")
    corpus = getattr(importlib.import_module(home), name)
    assert issubclass(corpus, Corpus)
    # What the program supplies, and what nobody but a user knows.
    told = {"end_of_text": 0} if "end_of_text" in inspect.signature(corpus).parameters else {}
    given["vocab_size"] = given["vocab_size"] or 300
    module = TextDataModule(corpus(**node, **told), seed=0, num_steps=1, **given)
    assert module.cache_dir.is_absolute()


def test_importing_the_package_loads_neither_torch_nor_lightning() -> None:
    code = "import sys, lightning_base.data; print('torch' in sys.modules or 'pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
