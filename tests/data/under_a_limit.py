"""Prepares a corpus and reads all of its training batches in less memory than the corpus would take: a program, with
the kind of corpus, its size in MB, the MB that it may take, and a folder."""

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np

from lightning_base.data import TextDataModule, TextFiles, TokenFiles

MB = 1 << 20
END = 20_000


def write_ids(path: Path, megabytes: int) -> int:
    """Gives how many there are."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(random.integers(0, END + 1, MB // 2, dtype=np.uint16).tobytes())
    return megabytes * MB // 2


def write_text(path: Path, megabytes: int) -> None:
    """Documents of some hundred words: a text without any takes long to learn."""
    random = np.random.default_rng(0)
    words = np.asarray([f"word{i} " for i in range(3000)])
    with path.open("w") as file:
        while file.tell() < megabytes * MB:
            file.write(json.dumps({"text": "".join(words[random.integers(0, 3000, 500)])}) + "\n")


def data_in_use() -> int:
    """Bytes of writable memory that belong to this process alone, which is what the limit counts."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def main(kind: str, megabytes: int, allowed: int, folder: Path) -> None:
    if kind == "ids":
        write_ids(folder / "a.bin", megabytes)
    else:
        write_text(folder / "a.jsonl", megabytes)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many threads as cores would take more on some machines
    limit = data_in_use() + allowed * MB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(megabytes * MB, dtype=np.uint8)
    except MemoryError:
        print("the corpus does not fit")
    if kind == "ids":
        corpus = TokenFiles(str(folder / "a.bin"), dtype="uint16", end_of_text=END)
    else:
        corpus = TextFiles(str(folder / "a.jsonl"))
    data = TextDataModule(
        corpus,
        sequence_length=4096,
        global_batch=8,
        routing_group=1,
        vocab_size=END + 1,
        end_of_text=END if kind == "ids" else None,
        validation_fraction=0.1,
        cache_dir=folder / "cache",
        seed=1,
        num_steps=1,
    )
    data.prepare_data()
    assert data.prepared is not None
    data.num_steps = len(data.training_sequences()) // 8
    data.setup("fit")
    read = sum(batch["targets"].numel() for batch in data.train_dataloader())
    print("training tokens", data.prepared.statistics["train_tokens"], "read", read)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
