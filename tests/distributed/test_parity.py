"""One rank, accumulation, DDP, experts over ranks and FSDP learn the same from the same text, router by router."""

from pathlib import Path

import forks
import program
import pytest
import torch
from parity import LAYOUTS, SHUFFLED, Training, difference, joined, train
from router_arms import ROUTERS

# In the short form: balance with a memory, drops with a loss over several experts, the same with noise and drops that
# depend on what stands before a token, one expert.
SHORT_ROUTERS = ("base", "gshard", f"gshard{SHUFFLED}", "dense")
ALL_ROUTERS = [*ROUTERS, *(f"{router}{SHUFFLED}" for router in ("base", "gshard", "switch", "hash", "random"))]
SHORT_LAYOUTS = (
    "accumulation",
    "2 ranks, fsdp",
    "2 ranks, expert_parallel, accumulation, recomputed",
    "4 ranks, expert_parallel 2 x 2",
)
ALONE = "one rank"
TOLERANCE = 1e-11
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


def trainings(folder: Path, routers: list[str], layouts: list[str]) -> dict[tuple[str, str], Training]:
    """Every router in every layout, by layout and router; one process tree for each number of ranks."""
    found = {(layout, router): [] for layout in layouts for router in routers}
    for ranks in sorted({LAYOUTS[layout].ranks for layout in layouts}):
        here = [layout for layout in layouts if LAYOUTS[layout].ranks == ranks]
        if ranks == 1:
            found |= {(layout, router): [train(router, LAYOUTS[layout])] for layout in here for router in routers}
            continue
        script = Path(__file__).with_name("parity.py")
        path = ":".join(map(str, (program.REPOSITORY, script.parent, script.parent.parent)))
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        done = forks.run(
            [*launch, script, folder, "|".join(routers), "|".join(here)],
            environment={**program.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            timeout=540,
        )
        assert done.returncode == 0, done.stderr
        for rank in range(ranks):
            for key, one in torch.load(folder / f"{rank}.pt", weights_only=True).items():
                found[key].append(one)
    return {key: joined(by_rank) for key, by_rank in found.items()}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Training]:
    return trainings(tmp_path_factory.mktemp("parity"), list(SHORT_ROUTERS), [ALONE, *SHORT_LAYOUTS])


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Training]:
    return trainings(tmp_path_factory.mktemp("parity"), ALL_ROUTERS, list(LAYOUTS))


def check(found: dict[tuple[str, str], Training], layout: str, router: str) -> None:
    alone, other = found[ALONE, router], found[layout, router]
    # Nothing here is rounded: which expert each token went to, and how many tokens each expert was asked for.
    assert other.decisions == alone.decisions
    assert other.counts == alone.counts
    assert other.metrics.keys() == alone.metrics.keys()
    for what, largest in difference(alone, other).items():
        assert largest < TOLERANCE, f"{what} in {layout}"


@pytest.mark.parametrize("layout", SHORT_LAYOUTS)
@pytest.mark.parametrize("router", SHORT_ROUTERS)
def test_a_layout_learns_what_one_rank_learns(router: str, layout: str, short: dict[tuple[str, str], Training]) -> None:
    check(short, layout, router)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != ALONE])
@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_every_layout_learns_what_one_rank_learns_with_every_router(
    router: str, layout: str, long: dict[tuple[str, str], Training]
) -> None:
    check(long, layout, router)


def test_what_is_compared_is_worth_comparing(short: dict[tuple[str, str], Training]) -> None:
    for (_, router), one in short.items():
        assert len(one.losses) == 3
        assert min(one.norms) > 0.5, "every step is clipped"
        moved = {name for name, gradient in one.gradients[-1].items() if bool(gradient.any())}
        assert moved == set(one.gradients[-1]) or router == "dense"
        assert sum(map(len, one.decisions)) > 200
