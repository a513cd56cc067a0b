"""Holds a manifest against the other files of its run, which say the same things in other words.

A manifest is sealed by its SHA-256 in status.json, and whoever reseals it has not yet changed the configuration, the
metrics and the counts that were written while the run went on: a run whose files contradict each other is not reported.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from lightning_base.report.flat import flatten
from lightning_base.report.read import Run
from lightning_base.run_directory import RunDirectory

FINGERPRINTS = {"corpus_fingerprint": 64, "batch_fingerprint": 32, "initial_weights_fingerprint": 64}
COUNTS = ("steps", "sequences", "tokens", "assignments", "assignments_dropped", "world_size")
LEDGER = ("num_experts", "top_k", "parameters", "active_parameters", "flops_per_token")
# Values pass through float32 on their way to the files; what a hand changes is larger.
TOLERANCE = 1e-5


def problems(run: Run) -> list[str]:
    """What speaks against the manifest of a run, one sentence per field; empty if nothing does."""
    malformed = list(check_form(run.manifest))
    if malformed:
        return malformed
    checks: tuple[Callable[[Run], Iterator[str]], ...] = (
        check_seal,
        check_config,
        check_ledger,
        check_totals,
        check_result,
        check_counts,
        check_balance,
    )
    return [sentence for check in checks for sentence in check(run)]


def check_form(manifest: dict[str, Any]) -> Iterator[str]:
    """Whether every field is there and looks as the trainer writes it."""
    for name, length in FINGERPRINTS.items():
        value = manifest.get(name)
        if not (isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value)):
            yield f"{name} in manifest.json is not {length} hexadecimal digits: {value!r}"
    for name in (*COUNTS, "seed"):
        if not is_count(manifest.get(name)):
            yield f"{name} in manifest.json is not a count: {manifest.get(name)!r}"
    for name, kind in {"config": dict, "packages": dict, "result": dict, "ledger": dict, "device": str}.items():
        if not isinstance(manifest.get(name), kind):
            yield f"{name} in manifest.json is missing or has another form"
            return
    ledger, modes = manifest["ledger"], manifest["ledger"].get("evaluation_modes")
    for name in LEDGER:
        value = ledger.get(name)
        if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            yield f"ledger.{name} in manifest.json is not a number above 0: {value!r}"
    if not (isinstance(modes, dict) and modes and all(isinstance(causal, bool) for causal in modes.values())):
        yield f"ledger.evaluation_modes in manifest.json does not say which ways are causal: {modes!r}"
    if not isinstance(ledger.get("causal_in_training"), bool):
        yield f"ledger.causal_in_training in manifest.json is not true or false: {ledger.get('causal_in_training')!r}"
    if not isinstance(ledger.get("router"), str):
        yield "ledger.router in manifest.json is missing"
    for name, value in {"final/loss": None, **manifest["result"]}.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            yield f"result.{name} in manifest.json is not a number: {value!r}"


def check_seal(run: Run) -> Iterator[str]:
    """The manifest is, byte for byte, what it was when the run was done."""
    if run.status.get("manifest_sha256") != RunDirectory(run.path).seal():
        yield "manifest.json is not what it was when the run ended: its SHA-256 is not manifest_sha256 in status.json"


def check_config(run: Run) -> Iterator[str]:
    """The configuration of the manifest is the one that every rank read."""
    written, read = flatten(run.manifest["config"]), flatten(run.config)
    for key in sorted(set(written) | set(read)):
        if written.get(key) != read.get(key) or (key in written) != (key in read):
            yield (f"config.{key} is {written.get(key)!r} in manifest.json and {read.get(key)!r} in .hydra/config.yaml")
    if run.manifest["seed"] != run.config.get("seed"):
        yield f"seed is {run.manifest['seed']} in manifest.json and {run.config.get('seed')} in .hydra/config.yaml"


def check_ledger(run: Run) -> Iterator[str]:
    """The ledger speaks of the router that was configured."""
    ledger, router = run.ledger, run.config.get("router", {})
    configured = str(router.get("_target_", "")).rpartition(".")[2]
    for name, value in {**router, "router": configured}.items():
        # A replay leaves open what its source decides.
        if name in ledger and value is not None and ledger[name] != value:
            yield f"ledger.{name} is {ledger[name]!r} in manifest.json and {value!r} in .hydra/config.yaml"
    chosen = run.config.get("module", {}).get("loss_coefficients") or {}
    for name, value in chosen.items():
        if ledger.get("loss_coefficients", {}).get(name) != value:
            yield f"ledger.loss_coefficients.{name} is not {value!r}, as .hydra/config.yaml has it"
    if ledger["active_parameters"] > ledger["parameters"]:
        yield "ledger.active_parameters is larger than ledger.parameters"


def check_totals(run: Run) -> Iterator[str]:
    """Steps, sequences and tokens follow from the configuration and from the last line of metrics.csv."""
    flat, manifest = flatten(run.config), run.manifest
    last = max((int(series.steps[-1]) for series in run.series.values()), default=0)
    if manifest["steps"] != last:
        yield f"steps is {manifest['steps']} in manifest.json and the last step in metrics.csv is {last}"
    if manifest["steps"] != flat.get("trainer.max_steps"):
        yield f"steps is {manifest['steps']} in manifest.json and trainer.max_steps is {flat.get('trainer.max_steps')}"
    batch, length = flat.get("data.global_batch"), flat.get("data.sequence_length")
    if batch and manifest["sequences"] != manifest["steps"] * batch:
        yield f"sequences is {manifest['sequences']} in manifest.json, not steps x data.global_batch={batch}"
    if length and manifest["tokens"] > manifest["sequences"] * length:
        yield f"tokens is {manifest['tokens']} in manifest.json, more than sequences x data.sequence_length={length}"
    if manifest["assignments_dropped"] > manifest["assignments"]:
        yield "assignments_dropped is larger than assignments in manifest.json"
    seconds = max((float(series.seconds[-1]) for series in run.series.values()), default=0.0)
    written = manifest.get("training_seconds")
    if isinstance(written, int | float) and abs(written - seconds) > 0.01 + TOLERANCE * seconds:
        yield f"training_seconds is {written} in manifest.json and {seconds} in metrics.csv"


def check_result(run: Run) -> Iterator[str]:
    """The result is what the final evaluation logged, and perplexity is the exponential of the loss."""
    result = run.manifest["result"]
    logged = {name for name in run.series if re.fullmatch(r"final(_\w+)?/\w+", name)}
    for name in sorted({*result, *logged}):
        value, measured = result.get(name), run.last(name)
        if value is None or measured is None or not close(value, measured):
            yield f"result.{name} is {value} in manifest.json and {measured} in metrics.csv"
        loss = result.get(name.replace("/perplexity", "/loss"))
        if name.endswith("/perplexity") and value is not None and loss is not None:
            expected = math.exp(loss) if loss < 700 else math.inf
            if not close(value, expected, 1e-3):
                yield f"result.{name} is {value} in manifest.json, not the exponential of the loss {loss}"


def check_counts(run: Run) -> Iterator[str]:
    """Assignments and drops of the manifest agree with those that expert_load.csv has seen."""
    manifest, layers = run.manifest, run.counts.get("train_step", {})
    if not layers:
        yield "expert_load.csv has no counts of train_step"
        return
    expected = manifest["tokens"] * run.ledger["top_k"] * len(layers)
    fewer = bool(run.ledger.get("asks_for_fewer"))
    if manifest["assignments"] > expected or (manifest["assignments"] < expected and not fewer):
        most = "at most " * fewer
        yield (
            f"assignments is {manifest['assignments']} in manifest.json, not {most}tokens x top_k x layers = {expected}"
        )
    asked = sum(int(counts.demand.sum()) for counts in layers.values())
    dropped = sum(int((counts.demand - counts.load).sum()) for counts in layers.values())
    every_step = all(len(counts.steps) == manifest["steps"] for counts in layers.values())
    low, high = dropped, dropped + manifest["assignments"] - asked
    total = manifest["assignments_dropped"]
    if not low <= total <= high or (every_step and total != dropped):
        yield f"assignments_dropped is {total} in manifest.json; expert_load.csv has seen {dropped} of {asked} dropped"
    width = {counts.demand.shape[1] for stage in run.counts.values() for counts in stage.values()}
    if width != {run.ledger["num_experts"]}:
        yield f"ledger.num_experts is {run.ledger['num_experts']} and expert_load.csv has {sorted(width)}"


def check_balance(run: Run) -> Iterator[str]:
    """max_vio in metrics.csv is what the counts of the final pass give."""
    for stage, layers in run.counts.items():
        for layer, counts in layers.items() if stage.startswith("final") else ():
            for side, numbers in (("demand", counts.demand[-1]), ("load", counts.load[-1])):
                name = f"{stage}/max_vio/{side}/{layer}"
                logged, total = run.last(name), int(numbers.sum())
                if logged is not None and total and not close(logged + 1, int(numbers.max()) * len(numbers) / total):
                    yield f"{name} is {logged} in metrics.csv, and expert_load.csv gives another value"


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def close(a: float, b: float, tolerance: float = TOLERANCE) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance)
