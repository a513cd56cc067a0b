"""Which runs may be reported: those that are finished, and whose files say the same things in other words.

A manifest is sealed by its SHA-256 in status.json, and whoever reseals it has not yet changed the configuration, the
metrics and the counts that were written while the run went on: a run whose files contradict each other is not reported.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_base.program.run_directory import RunDirectory, read_json
from lightning_base.results.read import LeftOut, ReportError, Run, flatten, printable, read_job

PARTS = {"config": dict, "packages": dict, "result": dict, "ledger": dict, "device": str}
AMOUNTS = ("num_experts", "top_k", "parameters", "active_parameters", "flops_per_token")
# What fields of the manifest are: how that looks in JSON, and which they are.
FORM: dict[str, tuple[str, tuple[str, ...]]] = {
    "a count": (r"\d+", ("seed", "steps", "sequences", "tokens", "assignments", "assignments_dropped", "world_size")),
    "a number above 0": (r"(?!0(\.0)?$)\d[\d.e+-]*", tuple(f"ledger.{name}" for name in AMOUNTS)),
    "a number": (r"-?(\d[\d.e+-]*|Infinity)|NaN", ("result.final/loss",)),
    "ways, each causal or not": (r'\{("[^"]*": (true|false)(, )?)+\}', ("ledger.evaluation_modes",)),
    "true or false": ("true|false", ("ledger.causal_in_training",)),
    "a name": ('".*"', ("ledger.router",)),
    "64 hexadecimal digits": ('"[0-9a-f]{64}"', ("corpus_fingerprint", "initial_weights_fingerprint")),
    "32 hexadecimal digits": ('"[0-9a-f]{32}"', ("batch_fingerprint",)),
}
BROKEN = "manifest.json is not what it was when the run ended: its SHA-256 is not manifest_sha256 in status.json"
# Values pass through float32 on their way to the files; what a hand changes is larger.
TOLERANCE = 1e-5
# A field, what it is, what it should be, and who says that; only those where the two differ speak against a run.
Findings = Iterator[tuple[str, Any, Any, str]]
IN_CONFIG, IN_METRICS = "in manifest.json and {!r} in .hydra/config.yaml", "in manifest.json and {!r} in metrics.csv"


def sound_runs(*directories: Path) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs of experiments, or of directories of single jobs, in the order of their sweeps; and the rest.

    Runs whose files contradict each other are among the rest, and a directory without a job.

    Raises:
        ReportError: a directory is not there.
    """
    sound: list[Run] = []
    left_out: list[LeftOut] = []
    for directory in dict.fromkeys(directories):
        if not directory.is_dir():
            raise ReportError(f"{directory} is not a directory: give one that runs have been written to")
        jobs = list_jobs(directory, left_out)
        for path, label in jobs.items():
            job = read_job(path, label)
            if isinstance(job, Run) and (wrong := problems(job)):
                job = LeftOut(path.name, label, "refused", "; ".join(wrong))
            sound.append(job) if isinstance(job, Run) else left_out.append(job)
        if not jobs:
            deeper = sorted({path.parent.parent.name for path in directory.glob("*/*/status.json")})
            hint = f"its folders {', '.join(deeper[:8])} do" if deeper else "runs are folders with a status.json"
            left_out.append(LeftOut(directory.name, str(directory), "no experiment", f"it holds no run; {hint}"))
    return sound, left_out


def list_jobs(directory: Path, left_out: list[LeftOut]) -> dict[Path, str]:
    """The jobs of an experiment with their labels: those of its sweep in order, then any others by name."""
    if (directory / "status.json").exists():
        return {directory: directory.resolve().name}
    labels: dict[str, str] = {}
    try:
        # A name in sweep.json is a folder right here, whatever a hand may have written into the file.
        sweep = read_json(directory / "sweep.json")
        jobs = {**sweep.get("earlier", {}), **sweep.get("jobs", {})}
        labels = {Path(str(name)).name: printable(str(label)) for name, label in jobs.items()}
    except (ValueError, TypeError, OSError) as error:
        left_out.append(LeftOut("sweep.json", "sweep.json", "unreadable", f"runs have the names of folders: {error}"))
    for path in sorted(directory.glob("[!.]*/")):
        # A job that was killed before it could say anything has its configuration.
        if any((path / name).exists() for name in ("status.json", "manifest.json", ".hydra/config.yaml")):
            labels.setdefault(path.name, path.name)
    return {directory / name: label for name, label in labels.items()}


def problems(run: Run) -> list[str]:
    """What speaks against the files of a run, one sentence per field; empty if nothing does."""
    try:
        if malformed := list(check_form(run.manifest)):
            return malformed
        sealed = run.status.get("manifest_sha256") == RunDirectory(run.path).seal()
        return [BROKEN] * (not sealed) + [
            f"{name} is {here!r} {said.format(there)}"
            for check in (against_config, against_metrics, against_loads)
            for name, here, there, said in check(run)
            if not (here is there or here == there)
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return [f"its files are not of the form a run writes ({type(error).__name__}: {error})"]


def check_form(manifest: dict[str, Any]) -> Iterator[str]:
    """Whether every field is there and looks as the trainer writes it."""
    if missing := [name for name, kind in PARTS.items() if not isinstance(manifest.get(name), kind)]:
        yield f"{', '.join(missing)} in manifest.json: missing, or of another form"
        return
    parts = {f"{part}.{name}": x for part in ("ledger", "result") for name, x in manifest[part].items()}
    results = [name for name in parts if name.startswith("result.")]
    for looks, (pattern, names) in FORM.items():
        for name in dict.fromkeys((*names, *results) if looks == "a number" else names):
            value = {**manifest, **parts}.get(name)
            if not re.fullmatch(pattern, json.dumps(value)):
                yield f"{name} in manifest.json is not {looks}: {value!r}"


def against_config(run: Run) -> Findings:
    """The configuration of the manifest is the one that every rank read, and its ledger speaks of that router."""
    written = flatten({name: run.manifest[name] for name in ("config", "seed")})
    read = flatten({"config": run.config, "seed": run.config.get("seed")})
    for key in sorted({*written, *read}):
        yield key, written.get(key, "not there"), read.get(key, "not there"), IN_CONFIG
    ledger, router = run.ledger, run.config.get("router", {})
    configured = {**router, "router": str(router.get("_target_", "")).rpartition(".")[2]}
    for name, value in configured.items():
        # A replay leaves open what its source decides.
        if name in ledger and value is not None:
            yield f"ledger.{name}", ledger[name], value, IN_CONFIG
    for name, value in (run.config.get("module", {}).get("loss_coefficients") or {}).items():
        yield f"ledger.loss_coefficients.{name}", ledger.get("loss_coefficients", {}).get(name), value, IN_CONFIG
    active, most = ledger["active_parameters"], ledger["parameters"]
    yield "ledger.active_parameters", active, min(active, most), "in manifest.json, more than ledger.parameters={}"


def against_metrics(run: Run) -> Findings:
    """Totals follow from the configuration and the last step in metrics.csv, and results are what is logged there."""
    flat, manifest, series = run.fields, run.manifest, run.series.values()
    steps, sequences, tokens = (manifest[name] for name in ("steps", "sequences", "tokens"))
    yield "steps", steps, max((int(found.steps[-1]) for found in series), default=0), IN_METRICS
    yield "steps", steps, flat.get("trainer.max_steps"), "in manifest.json and trainer.max_steps is {}"
    batch, most = flat.get("data.global_batch"), sequences * (flat.get("data.sequence_length") or math.inf)
    expected = steps * batch if batch else sequences
    yield "sequences", sequences, expected, "in manifest.json, not steps x data.global_batch = {}"
    yield "tokens", tokens, min(tokens, most), "in manifest.json, more than sequences x data.sequence_length = {}"
    seconds, ended = manifest.get("training_seconds"), max((float(found.seconds[-1]) for found in series), default=0.0)
    if isinstance(seconds, int | float) and abs(seconds - ended) > 0.01 + TOLERANCE * ended:
        yield "training_seconds", seconds, ended, IN_METRICS
    result = manifest["result"]
    for name in sorted({*result, *(name for name in run.series if re.fullmatch(r"final(_\w+)?/\w+", name))}):
        value, loss = result.get(name), result.get(name.replace("/perplexity", "/loss"))
        yield f"result.{name}", *near(value, run.last(name)), IN_METRICS
        # Perplexity is the exponential of the loss.
        if name.endswith("/perplexity") and value is not None and loss is not None:
            expected = math.exp(loss) if loss < 700 else math.inf
            yield f"result.{name}", *near(value, expected, 1e-3), "in manifest.json, and the exponential of the loss {}"


def against_loads(run: Run) -> Findings:
    """Assignments and drops of the manifest, and max_vio in metrics.csv, agree with what expert_load.csv has seen."""
    manifest, layers = run.manifest, run.counts.get("train_step", {}).values()
    total, dropped = manifest["assignments"], manifest["assignments_dropped"]
    expected = manifest["tokens"] * run.ledger["top_k"] * len(layers)
    asked = sum(int(counts.demand.sum()) for counts in layers)
    least = asked - sum(int(counts.load.sum()) for counts in layers)
    fewer = "at most " * bool(run.ledger.get("asks_for_fewer"))
    said = f"in manifest.json, not {fewer}tokens x top_k x layers = {{}}"
    yield "assignments", total, min(total, expected) if fewer else expected, said
    yield "assignments", total, max(total, asked), "in manifest.json, fewer than expert_load.csv has seen: {}"
    every_step = all(len(counts.steps) == manifest["steps"] for counts in layers)
    most = least if every_step else least + total - asked
    said = f"in manifest.json; expert_load.csv has seen {least} of {asked} dropped"
    yield "assignments_dropped", dropped, min(max(dropped, least), most), said
    width = {counts.demand.shape[1] for stage in run.counts.values() for counts in stage.values()}
    yield "ledger.num_experts", [run.ledger["num_experts"]], sorted(width), "in manifest.json and {} in expert_load.csv"
    for stage, found in run.counts.items():
        for layer, counts in found.items() if stage.startswith("final") else ():
            for side, numbers in (("demand", counts.demand[-1]), ("load", counts.load[-1])):
                name, total = f"{stage}/max_vio/{side}/{layer}", int(numbers.sum())
                logged, counted = run.last(name), int(numbers.max()) * len(numbers) / max(total, 1)
                if logged is not None and total:
                    yield f"1 + {name}", *near(logged + 1, counted), "in metrics.csv and {} in expert_load.csv"


def near(value: float | None, expected: float | None, tolerance: float = TOLERANCE) -> tuple[Any, Any]:
    """The two, made one where they differ by rounding alone; what is missing differs from everything."""
    if value is None or expected is None:
        return value, expected if value is not None or expected is not None else "nothing"
    alike = (math.isnan(value) and math.isnan(expected)) or math.isclose(value, expected, rel_tol=tolerance)
    return (expected, expected) if alike else (value, expected)
