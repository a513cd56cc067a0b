"""Weights & Biases and MLflow, offline: what a real run leaves is read back without the logger."""

import importlib.util
import json
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import forks
import program
import pytest

from lightning_base.instantiation import ConfigError
from lightning_base.program.config import LoggerConfig
from lightning_base.program.read_config import check_loggers


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"pip install -c constraints.txt -e '.[{package}]' brings {package}")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_is_answered_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(
        ConfigError, match=rf"^logger\.{name}=true needs a package .* 'lightning-base\[{name}\]', or choose "
    ):
        check_loggers(LoggerConfig(**{name: True}))
    check_loggers(LoggerConfig())


def test_the_program_says_so_with_exit_code_2(small_corpus: list[str], tmp_path: Path) -> None:
    without = (
        "import importlib.util as u, runpy, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'wandb' else find(name, *more); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = program.command(*small_corpus, "logger=wandb", f"runs_dir={tmp_path}")
    done = forks.run(["-c", without, *arguments])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: logger.wandb=true needs a package")
    assert not list(tmp_path.glob("*/*/status.json"))


@needs("mlflow")
@pytest.mark.exhaustive
def test_mlflow_keeps_the_scalars_and_the_configuration_in_its_database(
    small_corpus: list[str], tmp_path: Path
) -> None:
    done = program.train(*small_corpus, "router=uniform", "logger=mlflow", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    directory = program.only_job(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        (run,) = database.execute("select run_uuid, name, status from runs").fetchall()
        found = database.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        parameters = dict(database.execute("select key, value from params").fetchall())
    assert run == ((directory / "mlflow_run_id").read_text(), directory.name, "FINISHED")
    assert found == [(step, pytest.approx(value)) for step, value in program.series(directory, "train/loss")]
    assert parameters["trainer/max_steps"] == "4"
    assert not (directory / "tensorboard").exists()


@needs("wandb")
@pytest.mark.exhaustive
def test_wandb_leaves_an_offline_run_with_the_scalars(small_corpus: list[str], tmp_path: Path) -> None:
    done = program.train(*small_corpus, "router=uniform", "logger=wandb", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    directory = program.only_job(tmp_path)
    (file,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
    losses = [(row["train/loss"], row["trainer/global_step"]) for row in history(file) if "train/loss" in row]
    assert losses == [(pytest.approx(value), step) for step, value in program.series(directory, "train/loss")]


def history(file: Path) -> list[dict[str, float]]:
    """The rows of an offline run, from the records that ``wandb sync`` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB with chunks of a checksum, a length, a kind (1: whole, 4: last)."""
    at, record = 7, b""  # after the file's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little for another chunk's header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
