"""Run directories written by hand, small enough to know every number that a report should show.

One sparse layer, 4 experts, 4 steps of 2 sequences of 8 tokens: 64 tokens, 16 per step. ``BASE`` asks for [4, 4, 4, 4]
at every step; any other router for [8, 4, 2, 2], of which ``Switch`` drops 3 at expert 0. The final pass has 40 tokens:
[20, 10, 6, 4] for everyone, and [10, 10, 10, 10] for BASE in balance.
"""

import csv
import hashlib
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

STEPS, TOKENS, PER_STEP = 4, 64, 16
UNIGRAM_ENTROPY = 6.0
COEFFICIENTS = {"Switch": {"load_balancing_loss": 0.01}}


def config(router: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration; ``changes`` are by dotted key."""
    found: dict[str, Any] = {
        "name": "hand_made",
        "runs_dir": "runs",
        "seed": seed,
        "module": {"learning_rate": 0.01, "loss_coefficients": {}},
        "router": {"_target_": f"lightning_base.routing.some.{router}", "num_experts": 4},
        "model": {"width": 8, "split_width": True},
        "data": {"sequence_length": 8, "global_batch": 2, "routing_group": 1, "validation_sequences": 5},
        "trainer": {"max_steps": STEPS, "devices": 1, "log_every_n_steps": 1},
        "strategy": {"name": "single"},
    }
    if router == "Switch":
        found["router"]["capacity_factor"] = 1.25
    for key, value in changes.items():
        *path, last = key.split(".")
        node = found
        for part in path:
            node = node[part]
        node[last] = value
    return found


def write_run(
    folder: Path,
    router: str = "BASE",
    loss: float = 5.0,
    *,
    seed: int = 1,
    changes: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    ledger: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    series: dict[str, list[float]] | None = None,
) -> Path:
    """Writes a finished, consistent run.

    Args:
        folder: the job's directory.
        router: the class name in the ledger.
        loss: of the final pass.
        seed: also decides the fingerprints of batches and initial weights.
        changes: configuration by dotted key.
        manifest: fields of the manifest that are other than usual.
        ledger: the same for the ledger.
        without: scalars that are not written.
        series: more scalars, with a value for every step.
    """
    options = config(router, seed, changes or {})
    steps = options["trainer"]["max_steps"]
    training = (
        ([4, 4, 4, 4], [4, 4, 4, 4]) if router == "BASE" else ([8, 4, 2, 2], [5 if router == "Switch" else 8, 4, 2, 2])
    )
    results = {"final/loss": loss, "final/perplexity": math.exp(loss), "final/bits_per_byte": loss / 2}
    if router == "BASE":
        results |= {"final_balanced/loss": loss - 0.25, "final_balanced/perplexity": math.exp(loss - 0.25)}
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"state": "done", "seconds": 9.0, "updated": 1.8e9})
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"router={router.lower()}"]))
    usual: dict[str, Any] = {
        "corpus_fingerprint": "c" * 64,
        "batch_fingerprint": f"{seed:032x}",
        "initial_weights_fingerprint": f"{seed:064x}",
        "seed": seed,
        "config": deepcopy(options),
        "packages": {"torch": "2.13.0"},
        "python": "3.11.7",
        "git_commit": "a" * 40,
        "world_size": 1,
        "device": "x86_64, 1 threads",
        "corpus": {"unigram_entropy": UNIGRAM_ENTROPY, "validation_tokens": 40},
        "steps": steps,
        "sequences": 2 * steps,
        "tokens": PER_STEP * steps,
        "assignments": PER_STEP * steps,
        "assignments_dropped": (sum(training[0]) - sum(training[1])) * steps,
        "training_seconds": 2.0 * steps,
        "ledger": {
            "router": router,
            "num_experts": 4,
            "top_k": 1,
            "capacity_factor": options["router"].get("capacity_factor"),
            "causal_in_training": router != "BASE",
            "evaluation_modes": {"greedy": True, "balanced": False} if router == "BASE" else {"default": True},
            "parameters": 4000,
            "active_parameters": 1000,
            "loss_coefficients": COEFFICIENTS.get(router, {}),
            "flops_per_token": 6000.0,
            **(ledger or {}),
        },
        "result": results,
    }
    write_json(folder / "manifest.json", {**usual, **(manifest or {})})
    reseal(folder)
    write_counts(folder / "expert_load.csv", steps, training, balanced=router == "BASE")
    balance = BALANCE[router if router in BALANCE else "other"]
    write_metrics(folder / "metrics.csv", steps, results, balance, without, series or {})
    return folder


# max_vio and load_cv of demand and of load, in training and in the final pass, worked out by hand:
# [8, 4, 2, 2] has mean 4, max_vio (8 - 4) / 4 = 1, load_cv sqrt((16 + 0 + 4 + 4) / 4) / 4 = 0.61237;
# [5, 4, 2, 2] has mean 3.25, max_vio 1.75 / 3.25 = 0.53846, load_cv sqrt(1.6875) / 3.25 = 0.39970.
BALANCE = {
    "BASE": (0.0, 0.0, 0.0, 0.0),
    "Switch": (1.0, 0.61237, 0.53846, 0.39970),
    "other": (1.0, 0.61237, 1.0, 0.61237),
}
# [20, 10, 6, 4] has mean 10, max_vio 1, load_cv sqrt((100 + 0 + 16 + 36) / 4) / 10 = 0.61644.
FINAL = (1.0, 0.61644, 1.0, 0.61644)
NAMES = ("max_vio/demand", "load_cv/demand", "max_vio/load", "load_cv/load")


def write_seeds(folder: Path, **losses: tuple[float, ...]) -> None:
    """A run per router and seed, 1, 2, ..., with these final losses."""
    for router, by_seed in losses.items():
        for seed, loss in enumerate(by_seed, start=1):
            write_run(folder / f"{router}{seed}", router, loss, seed=seed)


def write_metrics(
    path: Path,
    steps: int,
    results: dict[str, float],
    training: tuple[float, ...],
    without: tuple[str, ...],
    series: dict[str, list[float]],
) -> None:
    """Two seconds a step; tokens per second 100, then 200, 400, 300: the median after the first is 300."""
    rows: list[tuple[int, float, str, float]] = []
    for step in range(1, steps + 1):
        seconds = 2.0 * step
        rows.append((step, seconds, "train/tokens_per_second", [100.0, 200.0, 400.0, 300.0][(step - 1) % 4]))
        for scope in ("train_group", "train_step"):
            for name, value in zip(NAMES, training, strict=True):
                rows += [(step, seconds, f"{scope}/{name}/{place}", value) for place in ("layer_1", "mean", "max")]
        rows.append((step, seconds, "validation/loss", results["final/loss"] + steps - step))
        rows += [(step, seconds, name, values[step - 1]) for name, values in series.items()]
    last = (steps, 2.0 * steps)
    rows += [(*last, name, value) for name, value in results.items()]
    passes = {"final_pass": FINAL} | ({"final_balanced_pass": (0.0,) * 4} if "final_balanced/loss" in results else {})
    for stage, values in passes.items():
        for name, value in zip(NAMES, values, strict=True):
            rows += [(*last, f"{stage}/{name}/{place}", value) for place in ("layer_1", "mean", "max")]
        rows.append((*last, f"{stage}/drop_rate/mean", 0.0))
    write_csv(path, ("step", "seconds", "name", "value"), [row for row in rows if row[2] not in without])


def write_counts(path: Path, steps: int, training: tuple[list[int], list[int]], balanced: bool) -> None:
    rows: list[tuple[Any, ...]] = []
    for step in range(1, steps + 1):
        rows += [(step, "train_step", "layer_1", e, *pair) for e, pair in enumerate(zip(*training, strict=True))]
    rows += [(steps, "final_pass", "layer_1", e, n, n) for e, n in enumerate([20, 10, 6, 4])]
    rows += [(steps, "final_balanced_pass", "layer_1", e, 10, 10) for e in range(4) if balanced]
    write_csv(path, ("step", "stage", "layer", "expert", "demand", "load"), rows)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, key: str, value: Any) -> None:
    """Changes one field of a JSON file by hand, by keys separated with ``>``; None deletes it."""
    content = json.loads(path.read_text())
    *parents, last = key.split(">")
    node = content
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    write_json(path, content)
    if path.name == "manifest.json":
        reseal(path.parent)


def reseal(folder: Path) -> None:
    """Writes the manifest's SHA-256 where a run keeps it: a forger who knows of the seal."""
    status = json.loads((folder / "status.json").read_text())
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    write_json(folder / "status.json", {**status, "manifest_sha256": digest})


def write_experiment(folder: Path) -> Path:
    """A sweep of two sound arms: BASE with a loss of 5.0, Switch with 4.5."""
    write_run(folder / "router=base", "BASE", 5.0)
    write_run(folder / "router=switch", "Switch", 4.5)
    write_json(folder / "sweep.json", {"jobs": {"router=base": "base", "router=switch": "switch"}})
    return folder
