"""Tokens per second on several ranks, and what many more ranks would send and hold, on paper.

Shapes: N windows, W ranks, P ranks that share the experts, E experts.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int64
from numpy import ndarray

from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.benchmark.volumes import metered, recorded_counts, volume
from lightning_base.program.run_directory import RunDirectory

STRATEGIES, RANKS, EVERY = ("ddp", "expert_parallel"), (1, 2, 4), 5
ALONE = "ddp, 1"
ON_PAPER, EXPERTS, GROUP = (8, 64, 256, 1024), 64, 64
# Weights, gradients and the two moments of AdamW, in float32.
BYTES_PER_PARAMETER = 16
LAYER = "sparse_1"


def records(form: Form, compiled: bool) -> list[Record]:
    """Real runs in turns, one thread per rank; then the volumes of a run with one expert per rank."""
    rounds, steps = (3, 40) if form == "full" else (1, 20)
    more = ("module.compile=true",) if compiled else ()
    return [*measured(rounds, steps, ("base", "switch") if form == "full" else ("base",), more), *on_paper(steps)]


def measured(rounds: int, steps: int, routers: tuple[str, ...], overrides: tuple[str, ...] = ()) -> Iterator[Record]:
    """Tokens per second of every strategy and number of ranks over those of one rank, window by window of the log.

    With one rank there is nothing to share or to reduce: both strategies are the same program, and differ by noise.
    """
    given = [f"strategy={','.join(STRATEGIES)}", f"trainer.devices={','.join(map(str, RANKS))}", "trainer.threads=1"]
    # Every rank of four needs a routing group.
    given += ["data.routing_group=4", f"trainer.log_every_n_steps={EVERY}", *overrides]
    paces: dict[str, dict[str, list[float]]] = {router: {} for router in routers}
    ratios: dict[str, dict[str, list[float]]] = {router: {} for router in routers}
    shares: dict[str, dict[str, list[float]]] = {router: {} for router in routers}
    for _ in range(rounds):
        for router in routers:
            with tempfile.TemporaryDirectory() as folder:
                found = {arm_of(run): run for run in train([f"router={router}", *given], steps, Path(folder))}
                alone = np.median(series(found[ALONE], "train/tokens_per_second"))
                for arm, run in found.items():
                    pace = series(run, "train/tokens_per_second")
                    paces[router].setdefault(arm, []).extend(pace)
                    ratios[router].setdefault(arm, []).extend(pace / alone)
                    shares[router].setdefault(arm, []).extend(series(run, "communication/share"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    setting = f"model=small, 2048 tokens a step, one thread a rank, {cores} cores for all ranks"
    for router in routers:
        for arm, ratios_N in ratios[router].items():
            share = shares[router][arm]
            yield ratio_record(
                "scaling",
                setting,
                f"{router}, {arm} rank{'s' * (arm != ALONE and not arm.endswith(' 1'))}",
                "throughput / one rank",
                np.array(ratios_N),
                better="higher",
                tokens_per_second=round(float(np.median(paces[router][arm]))),
                exchange=round(float(np.median(share)), 3) if share else None,
            )


def on_paper(steps: int) -> Iterator[Record]:
    """Volumes and memory of 8 to 1,024 ranks, from the routing groups of real runs with 64 experts on one rank.

    Assumed: each rank holds one routing group of 1,024 tokens; rank r of an expert group routes as the r-th of the
    run's last groups did, from the start again where there are fewer; up to 64 ranks share the experts, and more are
    copies of these; weights, gradients and moments of AdamW are float32, and held whole but for the experts; gradients
    are reduced in a ring. Some ranks of a fake world carry out their plans, and have to send what was computed.

    Raises:
        RuntimeError: they do not.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = ["router=base,switch", f"router.num_experts={EXPERTS}", "trainer.record_plans=true"]
        for run in train([*given, "strategy=single"], steps, Path(folder)):
            manifest = json.loads((run / "manifest.json").read_text())
            counts_GE = recorded_counts(run, LAYER, steps // 2)
            for ranks in ON_PAPER:
                yield from paper_records(manifest, counts_GE, ranks)


def paper_records(manifest: dict[str, Any], counts_GE: Int64[ndarray, "G E"], ranks: int) -> Iterator[Record]:
    """One router on so many ranks."""
    ledger, width, group = manifest["ledger"], manifest["config"]["model"]["width"], min(ranks, GROUP)
    equal = ledger["router"] == "BASE"
    counts_PE = counts_GE[np.arange(group) % len(counts_GE)]
    found = volume(counts_PE, width, equal=equal)
    for rank in {0, ranks // 2, ranks - 1}:
        total = metered(counts_PE, width, equal=equal, world=ranks, rank=rank)
        computed = found.sent[rank % group]
        if not total.sent == total.received == computed:
            raise RuntimeError(
                f"rank {rank} of {ranks}: computed are {computed} bytes of {ledger['router']}, "
                f"and {total.sent} were sent and {total.received} received"
            )
    total, experts = ledger["parameters"], ledger["parameters"] - ledger["active_parameters"]
    experts = experts * ledger["num_experts"] // (ledger["num_experts"] - ledger["top_k"])
    copies = ranks // group
    reduced = 2 * 4 * ((total - experts) * (ranks - 1) / ranks + experts // group * (copies - 1) / copies)
    memory = [BYTES_PER_PARAMETER * (total - experts + experts // share) for share in (group, 1)]
    setting = f"on paper: model=small, {EXPERTS} experts, 1024 tokens a rank, up to {GROUP} ranks share experts"

    def record(measure: str, ratio: float, **more: Any) -> Record:
        arm = f"{ledger['router']}, {ranks} ranks"
        return ratio_record("scaling", setting, arm, measure, np.array([ratio]), **more)

    yield record("busiest rank / mean", found.sent.max() / found.sent.mean())
    yield record("largest dispatch / mean", found.dispatch_largest / found.dispatch_mean)
    yield record(
        "memory / replicated",
        memory[0] / memory[1],
        sent_megabytes=round(found.sent.mean() / 1e6, 3),
        messages=group - 1,
        gradient_megabytes=round(reduced / 1e6, 2),
        megabytes=round(memory[0] / 1e6, 1),
    )


def train(arguments: list[str], steps: int, folder: Path) -> list[Path]:
    """Runs the program as a user does, one job after another; gives their directories.

    Raises:
        RuntimeError: it failed.
    """
    given = ["name=scaling", f"runs_dir={folder}", f"trainer.max_steps={steps}", "trainer.progress_bar=false"]
    given += [f"trainer.{what}_every_n_steps={steps}" for what in ("validate", "checkpoint")]
    given += ["data.validation_sequences=16", f"module.warmup_steps={min(20, steps)}"]
    program = [sys.executable, "-m", "lightning_base", "train", "-m"]
    done = subprocess.run([*program, *arguments, *given], capture_output=True, text=True)
    runs = sorted(path.parent for path in (folder / "scaling").glob("*/manifest.json"))
    if done.returncode or any(RunDirectory(run).status()["state"] != "done" for run in runs):
        raise RuntimeError(f"{' '.join(done.args)} failed:\n{done.stdout}\n{done.stderr}")
    return runs


def arm_of(run: Path) -> str:
    """Its strategy and number of ranks."""
    config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    return f"{config['strategy']['name']}, {config['trainer']['devices']}"


def series(run: Path, name: str) -> np.ndarray:
    """What was logged, without the first, which holds the warm-up."""
    with open(run / "metrics.csv", newline="") as file:
        return np.array([float(row["value"]) for row in csv.DictReader(file) if row["name"] == name])[1:]
