"""What is saved in one layout of ranks goes on in any other: every expert, its moments, routers, schedule and text."""

from pathlib import Path
from typing import Any

import forks
import program
import pytest
import torch
from moving import LAST, SAVED, all_of, checkpoint_of, write_text
from parity import LAYOUTS
from tiny_training import SEQUENCES

from lightning_base.program.checkpoint import expert_part

ALONE, SHARDED, SLICED = "one rank", "2 ranks, expert_parallel", "2 ranks, expert_parallel with fsdp"
ON_TWO = ("2 ranks, ddp", SHARDED, "2 ranks, fsdp", SLICED)
ON_FOUR = ("4 ranks, expert_parallel 2 x 2", "4 ranks, expert_parallel 2 x 2 with fsdp", "4 ranks, expert_parallel")
EXPERTS = 8
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
Found = dict[Any, list[dict[str, Any]]]


def on_ranks(folder: Path, saves: tuple[str, ...], loads: tuple[str, ...]) -> Found:
    """What each rank found, by layout, or by source and target."""
    ranks = LAYOUTS[saves[0]].ranks
    script = Path(__file__).with_name("moving.py")
    path = ":".join(map(str, (program.REPOSITORY, script.parent, script.parent.parent)))
    # Alone in a process of its own too: what the shape checks do to functions cannot be saved.
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    done = forks.run(
        [*launch, script, folder, "|".join(saves), "|".join(loads)],
        environment={**program.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    by_rank = [torch.load(folder / f"{ranks}_{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {key: [of_rank[key] for of_rank in by_rank] for key in by_rank[0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("moving")
    write_text(place)
    return place


@pytest.fixture(scope="module")
def short(folder: Path) -> Found:
    found = on_ranks(folder, (ALONE,), ())
    found |= on_ranks(folder, (SHARDED, SLICED), (ALONE, SHARDED, SLICED))
    return found | on_ranks(folder, (ALONE,), (SHARDED, SLICED))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Found:
    place = tmp_path_factory.mktemp("moving")
    write_text(place)
    found = on_ranks(place, (ALONE,), ())
    found |= on_ranks(place, ON_TWO, (ALONE, *ON_TWO))
    found |= on_ranks(place, ON_FOUR, (ALONE, *ON_TWO, *ON_FOUR))
    found |= on_ranks(place, ON_TWO, ON_FOUR)
    return found | on_ranks(place, (ALONE,), (*ON_TWO, *ON_FOUR))


def check(found: Found, source: str, target: str) -> None:
    saved, begun = all_of(found[source], source, "saved"), all_of(found[source, target], target, "begun")
    assert saved["step"] == begun["step"] == SAVED
    assert saved["steps"] == begun["steps"] == {float(SAVED)}
    assert saved["schedule"] == begun["schedule"] == SAVED
    assert begun["tensors"].keys() == saved["tensors"].keys()
    for name, value in saved["tensors"].items():
        assert torch.equal(begun["tensors"][name], value), name
    # The text goes on where it stopped, or the weights at the end would be others.
    assert [rank["consumed"] for rank in found[source, target]] == [LAST * SEQUENCES] * LAYOUTS[target].ranks
    went_on, straight = (
        all_of(found[key], layout, "ended") for key, layout in (((source, target), target), (ALONE, ALONE))
    )
    assert went_on["step"] == LAST
    for name, value in straight["tensors"].items():
        torch.testing.assert_close(went_on["tensors"][name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("source", "target"),
    [(s, t) for s in (ALONE, SHARDED, SLICED) for t in (ALONE, SHARDED, SLICED) if (s, t) != (ALONE, ALONE)],
)
def test_it_goes_on_in_another_layout(source: str, target: str, short: Found) -> None:
    check(short, source, target)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", [ALONE, *ON_TWO, *ON_FOUR])
@pytest.mark.parametrize("source", [ALONE, *ON_TWO, *ON_FOUR])
def test_it_goes_on_in_every_layout_from_every_other(source: str, target: str, long: Found) -> None:
    if source == target == ALONE:
        pytest.skip("the layout that all others are held against")
    check(long, source, target)


def test_what_is_saved_has_learnt_something(short: Found) -> None:
    tensors = all_of(short[ALONE], ALONE, "saved")["tensors"]
    moments = [value for name, value in tensors.items() if name.endswith("exp_avg_sq")]
    assert len(moments) > 10
    assert all(bool(value.any()) for value in moments)
    prices = [value for name, value in tensors.items() if name.endswith("prices")]
    assert len(prices) == 2
    assert all(bool(value.any()) for value in prices)


def test_no_rank_holds_or_writes_more_than_its_share(short: Found, folder: Path) -> None:
    for key in (SHARDED, SLICED, (ALONE, SHARDED), (ALONE, SLICED)):
        for rank in short[key]:
            assert {n for moment in ("begun", "ended") for n in rank[moment]["experts"]} == {EXPERTS // 2}
    for layout in (SHARDED, SLICED):
        parts = [torch.load(checkpoint_of(folder, layout) / expert_part(held)) for held in (range(4), range(4, 8))]
        for part in parts:
            of_experts = [*part["parameters"].values(), *(m["exp_avg"] for m in part["moments"].values())]
            assert {len(value) for value in of_experts} == {EXPERTS // 2}
            assert {value.untyped_storage().nbytes() for value in of_experts} == {v.nbytes for v in of_experts}
        state = torch.load(checkpoint_of(folder, layout) / "state.pt")
        assert not [name for name in state["state_dict"] if ".experts." in name]
