"""Why BASE comes last in a short run: every suspicion an experiment, every experiment a table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_base.claims.inside import SCALES, epochs, movement, openness
from lightning_base.claims.studies import (
    NAMES,
    Arm,
    Studies,
    difference,
    final,
    final_loss,
    last,
    loss_at,
    mean,
)
from lightning_base.claims.verdict import Rows, plain, signed
from lightning_base.program.run_directory import read_json
from lightning_base.results.read import Run
from lightning_base.results.statistics import holm

LENGTHS = (80, 160, 320, 480, 640, 800, 1120, 1600)


def against(reference: str, arms: Mapping[str, Arm], *, same_model: bool = True) -> Rows:
    """Each arm's loss, and its difference from one of them, with p values corrected for their number."""
    found = {
        name: difference(arm, arms[reference], same_model=same_model) for name, arm in arms.items() if name != reference
    }
    corrected = dict(zip(found, holm([gap.p for gap in found.values()]), strict=True))
    rows: Rows = [["arm", "seeds", "loss", f"minus {reference}", "corrected p", "noise between seeds"]]
    for name, arm in arms.items():
        row = [name, str(len(arm)), plain(mean(arm))]
        more = (
            [signed(found[name]), probability(corrected[name]), f"{found[name].spread:.4f}"]
            if name in found
            else [""] * 3
        )
        rows.append([*row, *more])
    return rows


def probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def compared(studies: Studies, experiment: str = "compare") -> Rows:
    """A comparison, against dense and against dense with a gate."""
    arms = {NAMES[router]: studies.arm(experiment, router) for router in routers_of(studies, experiment)}
    rows = against("dense", arms)
    rows[0].insert(4, "minus gated_dense")
    for row in rows[1:]:
        row.insert(4, "" if row[0] == "gated_dense" else signed(difference(arms[row[0]], arms["gated_dense"])))
    return rows


def routers_of(studies: Studies, experiment: str) -> list[str]:
    """Those of the comparison that an experiment has finished runs of."""
    found = {run.ledger["router"] for run in studies.experiment(experiment)}
    return [router for router in NAMES if router in found]


def seeds(studies: Studies) -> Rows:
    """Ten seeds of the arms of the comparison that BASE is most held against."""
    return against(
        "base", {NAMES[router]: studies.arm("seeds", router) for router in ("BASE", "Dense", "Switch", "TopK")}
    )


def gates(studies: Studies) -> Rows:
    arms = {
        gate: studies.either("gate", "BASE", router__gate=gate)
        for gate in ("sigmoid", "centred_sigmoid", "twice_sigmoid", "softmax", "one")
    }
    return against("sigmoid", arms)


def scales(studies: Studies) -> Rows:
    """The same factor on the first weights of every learned router."""
    return grid(studies, "router_scale", "module__router_init_scale", SCALES, ("BASE", "Switch", "TopK"))


def mended(studies: Studies) -> Rows:
    """Every change of BASE that helped, beside the arms it is held against."""
    names = {router: studies.arm("compare", router) for router in ("Dense", "GatedDense", "Switch", "BASE")}
    arms = {NAMES[router]: arm for router, arm in names.items()}
    arms["base, centroids ten times longer"] = studies.arm("router_scale", "BASE", module__router_init_scale=10)
    arms["base, centroids learn ten times as fast"] = studies.arm(
        "router_learning_rate", "BASE", module__router_learning_rate_factor=10
    )
    arms["base, softmax gate"] = studies.arm("gate", "BASE", router__gate="softmax")
    return against("dense", arms)


def router_rates(studies: Studies) -> Rows:
    return grid(
        studies, "router_learning_rate", "module__router_learning_rate_factor", (0.1, 1, 10), ("BASE", "Switch")
    )


def rates(studies: Studies) -> Rows:
    routers = routers_of(studies, "learning_rate")
    held = ("Dense", "Switch")
    return grid(studies, "learning_rate", "module__learning_rate", (1.25e-3, 2.5e-3, 5e-3), routers, held=held)


def norms(studies: Studies) -> Rows:
    return grid(studies, "router_norm", "model__router_norm", (True, False), ("BASE", "Switch"))


def numbers(studies: Studies) -> Rows:
    return grid(studies, "num_experts", "router__num_experts", (2, 8, 32), ("BASE", "Switch"))


def places(studies: Studies) -> Rows:
    return grid(studies, "placement", "model__sparse_layers", ([1], [2], [1, 2]), ("BASE",), own=False)


def groups(studies: Studies) -> Rows:
    return grid(studies, "group_size", "data__routing_group", (2, 4, 8, 16), ("BASE",))


def shuffles(studies: Studies) -> Rows:
    """What dealing the tokens of a step out to its routing groups changes, by the size of a group."""
    rows: Rows = [["sequences in a group", "arm", "loss", "shuffled, minus not", "dropped, %", "shuffled, minus not"]]
    for group in (2, 4, 8):
        for router in ("BASE", "Switch"):
            plainly, dealt = (
                studies.arm("shuffle", router, data__routing_group=group, model__shuffle_tokens=on)
                for on in (False, True)
            )
            row = [str(group), NAMES[router], plain(mean(plainly)), signed(difference(dealt, plainly))]
            if router == "Switch":
                row += [plain(mean(plainly, dropped), 1), signed(difference(dealt, plainly, dropped), 1)]
            rows.append(row + [""] * (6 - len(row)))
    return rows


def dropped(run: Run) -> float:
    """How many assignments of the whole training run found no slot, in percent."""
    return 100 * float(run.manifest["assignments_dropped"]) / float(run.manifest["assignments"])


def grid(
    studies: Studies,
    experiment: str,
    key: str,
    values: Sequence,
    routers: Sequence[str],
    *,
    held: Sequence[str] | None = None,
    own: bool = True,
) -> Rows:
    """A row per value, a column per router; then BASE minus others, and with ``own`` minus itself as published.

    ``held`` are the others that BASE is held against: all of them, if it is not given.
    """
    name = key.replace("__", ".")
    held = [router for router in routers if router != "BASE"] if held is None else held
    heading = [name, *(NAMES[router] for router in routers), *(f"base minus {NAMES[router]}" for router in held)]
    published = studies.arm("compare", "BASE")
    own = own and "BASE" in routers
    rows: Rows = [[*heading, *["base minus base as published"] * own]]
    for value in values:
        arms = {router: studies.either(experiment, router, **{key: value}) for router in routers}
        row = [str(value), *(plain(mean(arm)) for arm in arms.values())]
        row += [signed(difference(arms["BASE"], arms[router])) for router in held]
        if own:
            gap = difference(arms["BASE"], published, same_model=False)
            row.append(signed(gap) if gap.spread > 0 else "")
        rows.append(row)
    return rows


def longer(studies: Studies) -> Rows:
    """Differences along a run of ten times the default's length."""
    arms = {NAMES[router]: studies.arm("length", router) for router in routers_of(studies, "length")}
    pairs = [
        ("gated_dense", "dense"),
        ("switch", "dense"),
        ("top_k", "dense"),
        ("hash", "dense"),
        ("base", "dense"),
        ("base", "gated_dense"),
        ("base", "switch"),
        ("base", "hash"),
    ]
    pairs = [pair for pair in pairs if set(pair) <= arms.keys()]
    rows: Rows = [["step", "dense", *(f"{one} minus {other}" for one, other in pairs)]]
    readers = {str(step): loss_at(step) for step in LENGTHS} | {"whole text, at the end": final_loss}
    for label, read in readers.items():
        gaps = [signed(difference(arms[one], arms[other], read)) for one, other in pairs]
        rows.append([label, plain(mean(arms["dense"], read)), *gaps])
    return rows


def replayed(studies: Studies) -> Rows:
    """Training from the first step on with the plan that a router ends with; evaluated greedily and in balance."""
    rows: Rows = [["plan", "gate", "loss, greedy", "loss, balanced", "greedy minus balanced", "tokens that differ"]]
    balanced, apart = final("final_balanced/loss"), last("final_balanced_pass/routing_gap/mean")
    for name, scale, own in (
        ("BASE", 1, studies.arm("compare", "BASE")),
        ("BASE", 10, studies.arm("router_scale", "BASE", module__router_init_scale=10)),
        ("Hash", 1, studies.arm("compare", "Hash")),
    ):
        title = NAMES[name] + (", centroids ten times longer" if scale != 1 else "")
        arms = {f"{title}, as it trained": ("its own", own)}
        for weight, gate in (("learned", "sigmoid"), ("one", "none")):
            found = studies.arm("replay_final", "Replay", made_from(name, scale), router__weight=weight)
            arms[f"{title}, its last plan ({gate})"] = (gate, found)
        for label, (gate, arm) in arms.items():
            row = [label.partition(" (")[0], gate, plain(mean(arm))]
            if name == "BASE":
                gap = difference(arm, arm, final_loss, balanced)
                row += [plain(mean(arm, balanced)), signed(gap), plain(mean(arm, apart), 2)]
            rows.append(row + [""] * (6 - len(row)))
    return rows


def made_from(router: str, scale: float) -> Callable[[Run], bool]:
    """Whether a replay's plan is from this router, whose weights were this much larger at first."""

    def holds(run: Run) -> bool:
        source = read_json(Path(run.config["router"]["source"]) / "manifest.json")
        return source["ledger"]["router"] == router and source["config"]["module"]["router_init_scale"] == scale

    return holds


TABLES: dict[str, Callable[[Studies], Rows]] = {
    "compared": compared,
    "seeds": seeds,
    "movement": movement,
    "openness": openness,
    "gates": gates,
    "epochs": epochs,
    "scales": scales,
    "mended": mended,
    "router_rates": router_rates,
    "rates": rates,
    "norms": norms,
    "numbers": numbers,
    "places": places,
    "groups": groups,
    "shuffles": shuffles,
    "longer": longer,
    "replayed": replayed,
    "english": lambda studies: compared(studies, "english"),
}
