"""What finished runs route where: how much tokens explain, which they attract, how even a second choice is.

Shapes: A assignments, T tokens, E experts.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lightning_base.analysis.measure import LEAST, measure
from lightning_base.analysis.route import read_text, route
from lightning_base.analysis.run import open_data, open_run
from lightning_base.analysis.tables import token_name
from lightning_base.metrics.specialization import Choices, attracted
from lightning_base.program.run_directory import read_json, write_json

FILE = "claims.json"
SEQUENCES, TOKENS = 256, 5


@dataclass(frozen=True)
class Routing:
    """Of one run's validation text, routed as in use; the mean over sparse layers.

    Args:
        current: share of the assignment's entropy that the token explains.
        previous: that the token before it explains.
        chance: that the token explains if tokens are shuffled.
        second_choice: max_vio of the second expert of each token; 0 with one expert per token.
        words: for each expert of the first sparse layer the tokens it attracts most.
    """

    current: float
    previous: float
    chance: float
    second_choice: float
    words: list[list[str]]


def routing_of(paths: list[Path]) -> dict[str, Routing]:
    """Routes the text of each run, once: the result stays in its directory."""
    found = {}
    for path in tqdm(paths, desc="routing", unit="run", leave=False, disable=None):
        kept = path / FILE
        if not kept.exists():
            write_json(kept, asdict(route_run(path)))
        found[str(path)] = Routing(**read_json(kept))
    return found


def route_run(path: Path) -> Routing:
    """Routes validation text by the newest checkpoint of a finished run."""
    run = open_run(path)
    newest = max(run.checkpoints)
    run = replace(run, checkpoints={newest: run.checkpoints[newest]})
    data = open_data(run, SEQUENCES)
    chosen = list(route(run, data))
    findings = measure(read_text(data), chosen)
    assert data.prepared is not None
    name = token_name(data.prepared.tokenizer())
    first, layers = findings.layers[0], findings.layers
    favourites = attracted(first.tokens.counts, first.tokens.totals, least=LEAST, most=TOKENS)
    n = len(layers)
    return Routing(
        current=sum(layer.tokens.information for layer in layers) / n,
        previous=sum(layer.preceding.information for layer in layers) / n,
        chance=sum(layer.tokens.information_by_chance for layer in layers) / n,
        second_choice=sum(second_choice(choices) for choices in chosen[0][1].values()) / n,
        words=[[name(token) for token in tokens] for tokens in favourites],
    )


def second_choice(choices: Choices) -> float:
    """max_vio of the second assignment of every token that has two; 0 if none has.

    A token's assignments stand in the order of its preference, as routers with k > 1 make them.
    """
    order_A = torch.argsort(choices.token_index, stable=True)
    token_A, expert_A = choices.token_index[order_A], choices.expert_index[order_A]
    again_A = torch.zeros_like(token_A, dtype=torch.bool)
    again_A[1:] = token_A[1:] == token_A[:-1]
    if not bool(again_A.any()):
        return 0.0
    counts_E = torch.bincount(expert_A[again_A], minlength=choices.num_experts).double()
    return float(counts_E.max() / counts_E.mean() - 1)
