"""The eight claims, each a function from finished experiments to a judgement.

Numbers are differences between runs with the same seed; intervals are 95 % t intervals.
"""

from collections.abc import Callable, Mapping, Sequence

from lightning_base.claims.speed import StepTimes
from lightning_base.claims.studies import (
    Arm,
    Studies,
    best,
    difference,
    final,
    final_loss,
    last,
    loss_at,
    mean,
)
from lightning_base.claims.verdict import Judged, Rows, Verdict, above, below, every, plain, signed, within
from lightning_base.claims.words import Routing
from lightning_base.results.read import Run

ONLY_THE_ROUTER = "Only the router differs: the default setting, `make experiment`."
ARCHITECTURES = (
    "`experiment=paper`: BASE and dense have one sparse layer of two residual blocks in the middle, Switch (capacity "
    "factor 1.0) and top-2 (2.0) replace every other feed-forward layer, with as many experts as make their parameters "
    "equal BASE's; loss weight 0.01. Tokens are not shuffled, which the paper leaves open."
)
SIMILAR = 0.05  # nats per token
PAPER_ARMS = {"dense": "Dense", "base": "BASE", "switch": "Switch", "top_2": "TopK"}


def balance(studies: Studies) -> Judged:
    """Claim 1."""
    rows: Rows = [["arm", "fullest expert in a routing group, above even", "auxiliary losses", "dropped"]]
    worst = {}
    for router in ("BASE", "Switch", "TopK", "Hash"):
        arm = studies.arm("compare", router)
        worst[router] = max(float(run.series["train_group/max_vio/load/max"].values.max()) for run in arm.values())
        losses = next(iter(arm.values())).ledger["loss_coefficients"]
        asked = sum(run.manifest["assignments"] for run in arm.values())
        share = sum(run.manifest["assignments_dropped"] for run in arm.values()) / asked
        named = ", ".join(f"{name} x {value:g}" for name, value in losses.items()) or "none"
        rows.append([router, f"{worst[router]:.3f}", named, f"{100 * share:.1f} %"])
    holds = worst["BASE"] == 0 and rows[1][2] == "none"
    return Judged(
        "Balanced loads are guaranteed, without an auxiliary loss or a new hyperparameter.",
        "Holds if no expert ever gets more than its share in any logged step of any seed, and no loss is added.",
        Verdict.HOLDS if holds else Verdict.FAILS,
        rows,
        ONLY_THE_ROUTER,
        ["compare"],
    )


def efficiency(studies: Studies, times: StepTimes) -> Judged:
    """Claim 2."""
    rates = sorted({float(run.config["module"]["learning_rate"]) for run in studies.experiment("paper")})
    tuned = {name: tune(studies, name, rates) for name in PAPER_ARMS}
    seconds = {name: times.step("paper", name) for name in PAPER_ARMS}
    steps = {name: next(iter(arm.values())).manifest["steps"] for name, (_, arm) in tuned.items()}
    budget = min(steps[name] * seconds[name] for name in PAPER_ARMS)
    heading = ["arm", "parameters", "FLOPs a token", "learning rate", "ms a step", "steps in that time", "loss"]
    rows: Rows = [[*heading, "BASE minus it", "at equal steps"]]
    verdicts = []
    for name, (rate, arm) in tuned.items():
        own = loss_at(budget / seconds[name])
        text = ["", ""]
        if name != "base":
            mine = loss_at(budget / seconds["base"])
            gap = difference(tuned["base"][1], arm, mine, own, same_model=False)
            text = [signed(gap), signed(difference(tuned["base"][1], arm, same_model=False))]
            verdicts.append(below(gap))
        reached = f"{budget / seconds[name]:.0f}"
        pace = [f"{rate:g}", f"{1000 * seconds[name]:.0f}", reached]
        rows.append([name, *size(arm), *pace, plain(mean(arm, own)), *text])
    return Judged(
        "Compute efficiency: for a given time on given hardware BASE has the best validation perplexity.",
        "Time is the number of steps times the median time of a step, of all arms taken in turns in one process. Holds "
        "if the interval of BASE minus each other arm is below 0, fails if one is above 0.",
        every(verdicts),
        rows,
        f"{ARCHITECTURES} {grid_text(rates, {name: rate for name, (rate, _) in tuned.items()})} {times.machine}",
        ["paper"],
    )


def size(arm: Arm) -> list[str]:
    """The parameters of an arm and its FLOPs per token, forward, in millions."""
    ledger = next(iter(arm.values())).ledger
    return [f"{ledger[name] / 1e6:.3f} M" for name in ("parameters", "flops_per_token")]


def grid_text(rates: Sequence[float], chosen: Mapping[str, float]) -> str:
    """Which learning rates were tried, and which arms are best at the lowest or the highest of them."""
    text = f"Each arm at the best of the learning rates {', '.join(f'{rate:g}' for rate in rates)}."
    edge = [name for name, rate in chosen.items() if rate in (rates[0], rates[-1])]
    return f"{text} Best at an edge of that grid, so perhaps better beyond it: {', '.join(edge)}." if edge else text


def tune(studies: Studies, name: str, rates: Sequence[float]) -> tuple[float, Arm]:
    """The learning rate with the lowest mean loss, and the arm there; the same grid for every arm."""
    arms = {rate: studies.arm("paper", PAPER_ARMS[name], module__learning_rate=rate) for rate in rates}
    rate = best(arms)
    return rate, arms[rate]


def throughput(times: StepTimes) -> Judged:
    """Claim 3."""
    rows: Rows = [["setting", "arm", "BASE's tokens per second over it", "quartiles", "the paper"]]
    said = {"dense": "0.91", "switch": "1.16"}
    ratios = {}
    for setting in times.settings:
        for name in times.arms(setting):
            if name != "base":
                found = ratios[setting, name] = times.ratio(setting, name, "base")
                published = said.get(name, "") if setting == "paper" else ""
                rows.append([setting, name, f"{found.median:.2f}", f"{found.low:.2f} to {found.high:.2f}", published])
    switch, dense = ratios["paper", "switch"], ratios["paper", "dense"]
    held = Verdict.HOLDS if switch.low > 1 and dense.low > 0.85 else Verdict.UNDECIDED
    return Judged(
        "BASE trains at nearly the speed of dense, and faster than Switch.",
        "Over steps taken in turns. Holds if the lower quartile is above 1 against Switch and above 0.85 against "
        "dense; fails if an upper quartile is below.",
        Verdict.FAILS if switch.high < 1 or dense.high < 0.85 else held,
        rows,
        f"One process: nothing is communicated, which is what the paper's advantage comes from. {times.machine}",
        [],
    )


def one_large_layer(studies: Studies) -> Judged:
    """Claim 4."""
    arms = {name: studies.arm("compare", name) for name in ("BASE", "TopK", "Switch")}
    found = difference(arms["BASE"], arms["TopK"])
    rows: Rows = [["arm", "parameters", "FLOPs a token", "loss", "BASE minus it"]]
    rows += [
        [name, *size(arm), plain(mean(arm)), "" if name == "BASE" else signed(difference(arms["BASE"], arm))]
        for name, arm in arms.items()
    ]
    return Judged(
        "With one large sparse layer in the middle, BASE is better than top-2 experts.",
        "Holds if the interval of BASE minus top-2 is below 0, fails if it is above.",
        below(found),
        rows,
        f"{ONLY_THE_ROUTER} One layer of four residual blocks; top-2 with as many experts of half the width, so that "
        "FLOPs are equal and its parameters fewer.",
        ["compare"],
    )


def robustness(studies: Studies) -> Judged:
    """Claim 5."""
    middle = studies.arm("placement", "BASE", model__sparse_layers=[1])
    places = {
        "top": studies.arm("placement", "BASE", model__sparse_layers=[2]),
        "two interleaved": studies.arm("placement", "BASE", model__sparse_layers=[1, 2]),
    }
    rows: Rows = [
        ["what", "loss", "minus the middle", "minus dense of that size"],
        ["middle", plain(mean(middle)), "", ""],
    ]
    verdicts = []
    for name, arm in places.items():
        gap = difference(arm, middle, same_model=False)
        rows.append([name, plain(mean(arm)), signed(gap), ""])
        verdicts.append(within(gap, SIMILAR))
    for width in (128, 256, 512):
        arm, dense = (studies.either("expert_size", router, model__ffn_width=width) for router in ("BASE", "Dense"))
        gap = difference(arm, dense)
        rows.append([f"experts of width {width}", plain(mean(arm)), "", signed(gap)])
        verdicts.append(below(gap))
    interleaved = below(difference(places["two interleaved"], middle, same_model=False)).value
    return Judged(
        "Position, number of layers and size of the experts matter little.",
        f"Holds if each place is within {SIMILAR} nats of the middle and BASE is below dense at every size; fails if "
        "one place is surely farther away or BASE is surely above dense at one size.",
        every(verdicts),
        rows,
        "Places: the default setting with two blocks, so that there is a middle. Sizes: the default setting. The paper "
        "also finds interleaved layers best; by whether the interval of theirs minus the middle is below 0: "
        f"{interleaved}. This rule alone is younger than the runs.",
        ["compare", "placement", "expert_size"],
    )


def test_balance(studies: Studies, routing: Mapping[str, Routing]) -> Judged:
    """Claim 6."""
    base, switch = studies.arm("compare", "BASE"), studies.arm("compare", "Switch")
    vio = last("final_pass/max_vio/demand/mean")
    against_switch = difference(base, switch, vio)
    top_2, second = studies.arm("compare", "TopK"), reader(routing, "second_choice")
    against_second = difference(base, top_2, vio, second)
    rows: Rows = [
        ["who", "fullest expert above even", "BASE minus it"],
        ["BASE, greedy", plain(mean(base, vio), 3), ""],
        ["Switch", plain(mean(switch, vio), 3), signed(against_switch, 3)],
        ["second expert of top-2", plain(mean(top_2, second), 3), signed(against_second, 3)],
    ]
    return Judged(
        "Greedy at test time, BASE is less balanced than top-1 with a loss, and more than top-2's second expert.",
        "max_vio over the validation text, before drops. Holds if the interval of BASE minus Switch is above 0 and "
        "that of BASE minus the second expert below; fails if one of them is on the other side.",
        every([above(against_switch), below(against_second)]),
        rows,
        ONLY_THE_ROUTER,
        ["compare"],
    )


def specialization(studies: Studies, routing: Mapping[str, Routing]) -> Judged:
    """Claim 7."""
    rows: Rows = [["arm", "current token explains", "token before it explains", "by chance"]]
    columns = {name: reader(routing, name) for name in ("current", "previous", "chance")}
    for router in ("BASE", "Switch", "TopK", "Hash"):
        arm = studies.arm("compare", router)
        rows.append([router, *(plain(mean(arm, read), 3) for read in columns.values())])
    base = studies.arm("compare", "BASE")
    gap = difference(base, base, columns["current"], columns["previous"])
    words = routing[str(next(iter(base.values())).path)].words
    rows += [[f"BASE, expert {i}", " ".join(found), "", ""] for i, found in enumerate(words)]
    return Judged(
        "Experts specialise locally: often the current token tells the expert.",
        "Share of the assignment's entropy that a token explains (mutual information over the entropy of the expert). "
        "Holds if the current token explains more than the one before it, and the interval of the difference is above "
        "0.1; fails if it is below 0.1.",
        above(gap, 0.1),
        rows,
        f"{ONLY_THE_ROUTER} Validation text, greedy. Below: the five tokens that each expert of seed 1 attracts most.",
        ["compare"],
    )


def reader(routing: Mapping[str, Routing], name: str) -> Callable[[Run], float]:
    return lambda run: float(getattr(routing[str(run.path)], name))


def left_open(studies: Studies) -> Judged:
    """Claim 8."""
    exact = studies.either("solver", "BASE", router__solver="transport")
    rows: Rows = [["what", "loss", "minus the exact assignment in groups of 8 sequences"]]
    rows.append(["exact, groups of 8", plain(mean(exact)), ""])
    auction = studies.arm("solver", "BASE", router__solver="auction")
    gap = difference(auction, exact)
    rows.append(["the paper's auction", plain(mean(auction)), signed(gap)])
    for solver in ("sinkhorn", "greedy"):
        arm = studies.arm("solver", "BASE", router__solver=solver)
        rows.append(
            [{"greedy": "no balance at all"}.get(solver, solver), plain(mean(arm)), signed(difference(arm, exact))]
        )
    for group in (2, 4, 16):
        arm = studies.arm("group_size", "BASE", data__routing_group=group)
        rows.append([f"groups of {group}", plain(mean(arm)), signed(difference(arm, exact))])
    for group in (2, 4, 8):
        dealt = studies.arm("shuffle", "BASE", data__routing_group=group, model__shuffle_tokens=True)
        rows.append([f"groups of {group}, tokens dealt out", plain(mean(dealt)), signed(difference(dealt, exact))])
    balanced = final("final_balanced/loss")
    shift = difference(exact, exact, balanced, final_loss)
    rows.append(["exact, routed in balance at test time", plain(mean(exact, balanced)), signed(shift)])
    return Judged(
        "What the paper leaves open: does the exact assignment beat the auction?",
        "Holds if the interval of auction minus exact is above 0, fails if it is below.",
        above(gap),
        rows,
        "The default setting with one option changed.",
        ["solver", "group_size", "shuffle"],
    )
