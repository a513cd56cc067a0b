"""What happens inside routers while they learn: tokens that change experts, gates, centroids."""

import torch
from torch import Tensor

from lightning_base.claims.studies import NAMES, MissingError, Number, Studies, difference, last, mean
from lightning_base.claims.verdict import Rows, plain, signed
from lightning_base.program.checkpoint import CheckpointError, VerifiedCheckpointIO, checkpoints
from lightning_base.results.read import Run

SCALES = (1, 3, 10)
EARLY = "routing_change/step/mean"
OVER = "routing_change/validation/mean"


def movement(studies: Studies) -> Rows:
    """How many tokens of a fixed text change experts, early, late and over a run."""
    heading = ["arm", "in one step, early", "in one step, late", "in 20 steps, late", "loss"]
    rows: Rows = [[*heading, "early, minus base", "in 20 steps, minus base"]]
    early, late, over = at(EARLY, 0), last(EARLY), last(OVER)
    arms = {name: studies.arm("compare", router) for router, name in NAMES.items() if "Dense" not in router}
    scaled = {
        f"base, routers {s} times larger": studies.arm("router_scale", "BASE", module__router_init_scale=s)
        for s in (3, 10)
    }
    for name, arm in {**arms, **scaled}.items():
        gaps = (
            ["", ""] if name == "base" else [signed(difference(arm, arms["base"], read), 3) for read in (early, over)]
        )
        rows.append([name, *(plain(mean(arm, read), 3) for read in (early, late, over)), plain(mean(arm)), *gaps])
    return rows


def epochs(studies: Studies) -> Rows:
    """How many tokens of a fixed text have another expert one epoch later, from the first epoch's end on."""
    rows: Rows = [["arm", "first to second epoch", "second to third", "third to fourth"]]
    for router, name in NAMES.items():
        if "Dense" not in router:
            arm = studies.arm("epochs", router)
            rows.append([name, *(plain(mean(arm, at(OVER, i)), 3) for i in range(3))])
    return rows


def at(name: str, index: int) -> Number:
    """A value of a scalar by its place in the run."""
    return lambda run: float(run.series[name].values[index])


def openness(studies: Studies) -> Rows:
    """How far gates are open in the first and the last logged step; how long and how alike centroids are at the end."""
    heading = ["arm", "mean gate at first", "at the end", "length of centroids", "cosine between centroids", "loss"]
    rows: Rows = [heading]
    arms = {NAMES[router]: studies.arm("compare", router) for router in ("GatedDense", "Switch", "TopK", "BASE")}
    for gate in ("centred_sigmoid", "twice_sigmoid", "softmax", "one"):
        arms[f"base, gate {gate}"] = studies.arm("gate", "BASE", router__gate=gate)
    for scale in SCALES[1:]:
        arms[f"base, centroids {scale} times longer"] = studies.arm(
            "router_scale", "BASE", module__router_init_scale=scale
        )
    for factor in (0.1, 10):
        arms[f"base, centroids learn {factor:g} times as fast"] = studies.arm(
            "router_learning_rate", "BASE", module__router_learning_rate_factor=factor
        )
    confidence = "train_step/router_confidence/mean"
    for name, arm in arms.items():
        long, alike = [plain(mean(arm, read), 2) for read in (length, cosine)] if name.startswith("base") else ["", ""]
        ends = (plain(mean(arm, read), 3) for read in (at(confidence, 0), last(confidence)))
        rows.append([name, *ends, long, alike, plain(mean(arm))])
    return rows


def centroids(run: Run) -> Tensor:
    """The centroids of the first sparse layer at the end, [E, D]."""
    found_there = checkpoints(run.path / "checkpoints")
    if not found_there:
        raise MissingError(f"{run.path} has no checkpoint")
    try:
        state = VerifiedCheckpointIO().load_checkpoint(found_there[0])["state_dict"]
    except CheckpointError as error:
        raise MissingError(str(error)) from error
    found: Tensor = next(value for name, value in state.items() if name.endswith("router.centroids"))
    return found.double()


def length(run: Run) -> float:
    """The mean length of a centroid."""
    return float(centroids(run).norm(dim=-1).mean())


def cosine(run: Run) -> float:
    """The mean cosine of two centroids."""
    units_ED = torch.nn.functional.normalize(centroids(run), dim=-1)
    number = len(units_ED)
    return float((units_ED.sum(0).square().sum() - number) / (number * (number - 1)))
