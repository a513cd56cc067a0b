"""Whether the data keeps up: the loader against the model, and the tokenizer by itself.

Shapes: R rounds.
"""

import contextlib
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from lightning_base.benchmark.bare import SMALL_STEP, BareLoop, configuration
from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.data.corpus import Document
from lightning_base.data.encode import SplitWriter, batches
from lightning_base.data.python_stdlib import PythonStandardLibrary
from lightning_base.data.survey import Entry
from lightning_base.data.tokenizer import END_OF_TEXT, load_tokenizer, size_of

BATCHES = 40
LOADER_AIM, TOKENIZER_AIM = 20.0, 5.0  # times the model; MB/s a core


def records(form: Form, compiled: bool) -> list[Record]:
    """Tokens per second of the loader over those of a training step; MB per second and core of the tokenizer."""
    config, _ = configuration(["router=base", *SMALL_STEP, "trainer.max_steps=100000"])
    loop = BareLoop(config)
    loop.run(2)
    tokens = config.data.global_batch * config.data.sequence_length
    loading, training = [], []
    for _ in tqdm(range(15 if form == "full" else 5), desc="data", leave=False, disable=None):
        began = time.perf_counter()
        for _ in range(BATCHES):
            next(loop.batches)
        loading.append((time.perf_counter() - began) / BATCHES)
        training.append(loop.run(3) / 3)
    load_R, train_R = np.array(loading), np.array(training)
    speed: dict[str, Any] = {"tokens_per_second": round(tokens / float(np.median(load_R)))}
    setting = f"model=small, {tokens} tokens a step"
    ratios_R = train_R / load_R
    found = [
        ratio_record(
            "data", setting, "loader", "throughput / model's", ratios_R, better="higher", aim=LOADER_AIM, **speed
        )
    ]
    prepared = loop.data.prepared
    assert prepared is not None
    return [*found, tokenizing(load_tokenizer(prepared.folder / "tokenizer.json"), 9 if form == "full" else 3)]


def source() -> Iterator[Entry]:
    """The documents of the corpus as the writer takes them."""
    for document in PythonStandardLibrary().documents():
        yield Entry(document, len(document.text.encode()), 0)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """The tokenizer encodes on the calling thread alone."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def tokenizing(tokenizer: Tokenizer, rounds: int) -> Record:
    """How fast one core turns the standard library's source into token files; the ratio is to hashing the same text."""
    entries = list(itertools.chain(*itertools.islice(batches(source()), 4)))  # about 4 MB
    whole = "".join(document.text for document, _, _ in entries if isinstance(document, Document)).encode()
    domains = {entry.document.domain: 0 for entry in entries}
    end = tokenizer.get_vocab()[END_OF_TEXT]
    encoding, hashing = [], []
    with tempfile.TemporaryDirectory() as folder, one_core():
        for _ in range(rounds):
            began = time.perf_counter()
            with SplitWriter(Path(folder), "train", tokenizer, size_of(tokenizer), end) as writer:
                writer.write(entries, domains)
            encoding.append(time.perf_counter() - began)
            began = time.perf_counter()
            hashlib.sha256(whole).digest()
            hashing.append(time.perf_counter() - began)
    encode_R, hash_R = np.array(encoding), np.array(hashing)
    speed = len(whole) / 1e6 / float(np.median(encode_R))
    setting, measure = "python_stdlib, 4096 tokens", "throughput / SHA-256's"
    absolute = (speed, "MB/s a core", TOKENIZER_AIM)
    return ratio_record("data", setting, "tokenizer", measure, hash_R / encode_R, better="higher", absolute=absolute)
