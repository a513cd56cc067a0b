"""The figure of docs/assignment.md: what a price does, and how the loads come into balance.

Legend: T tokens, E experts.
"""

from pathlib import Path

import numpy as np
import torch

from lightning_base.assignment import transport
from lightning_base.assignment.choice import Choice
from lightning_base.assignment.examples import EXAMPLES
from lightning_base.assignment.passes import typical_margin
from lightning_base.assignment.prices import newton_step
from lightning_base.assignment.problem import even_loads


def draw(path: Path) -> None:
    """Write the figure as PNG: the load staircase of two experts, and tokens out of place after each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(3)
    lead = np.sort(rng.normal(0.8, 1.0, 20))  # s[t, 0] - s[t, 1] of twenty tokens
    price = np.linspace(-1.5, 3.2, 2000)
    left.step(price, (lead[None] > price[:, None]).sum(1), color="tab:blue", label="tokens that choose expert 0")
    smooth = np.clip((lead[None] - price[:, None]) / 0.8 * 0.5 + 0.5, 0, 1).sum(1)
    left.plot(price, smooth, color="tab:orange", label="smoothed, as Newton sees it")
    left.axhline(10, color="grey", linewidth=0.8)
    left.axvspan(lead[9], lead[10], color="tab:green", alpha=0.4, label="optimal price difference")
    left.set(xlabel="p[0] - p[1]", ylabel="load of expert 0", title="two experts, 20 tokens")
    left.legend(fontsize=7)

    names, excess = stages()
    right.bar(range(len(names)), excess, color="tab:blue")
    right.set_yscale("symlog", linthresh=10)
    right.set_xticks(range(len(names)), names, fontsize=7)
    for at, value in enumerate(excess):
        right.annotate(str(value), (at, value), ha="center", va="bottom", fontsize=7)
    right.set(ylabel="tokens over capacity", title="8192 tokens, 128 experts, Zipf clusters")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def stages() -> tuple[list[str], list[int]]:
    """Tokens over capacity when every token takes its best expert, after each step of a cold solve."""
    scores = EXAMPLES["Zipf clusters"](8192, 128, torch.Generator().manual_seed(0)).numpy()
    loads = even_loads(*scores.shape)
    choice = Choice(scores, 1)
    choice.at(np.zeros(128))
    names, excess = ["no prices"], [choice.excess(loads)]
    sample = np.ascontiguousarray(scores[:: transport.SAMPLE])
    _, prices = transport.solve_transport(sample, even_loads(*sample.shape), None)
    choice.at(prices)
    names.append("prices of\na sample")
    excess.append(choice.excess(loads))
    scale = typical_margin(choice.margin_T)
    for step, (factor, every) in enumerate(transport.NEWTON, start=1):
        tau = scale * factor
        newton_step(scores, choice.chosen_TK[:, 0], choice.margin_T, choice.load_E, loads.target, tau, every, prices)
        choice.at(prices)
        names.append(f"Newton {step}")
        excess.append(choice.excess(loads))
    return [*names, "shortest\npaths"], [*excess, 0]
