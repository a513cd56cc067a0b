"""Colours are the router's own, and curves lie where the numbers say."""

import re
from dataclasses import replace
from pathlib import Path

from hand_made_runs import edit, write_run, write_seeds

from lightning_base.report.document import build
from lightning_base.report.drawing import ROUTERS, router_color, styles
from lightning_base.report.figures import fullest_first, pareto_front, pictures
from lightning_base.report.measures import cost
from lightning_base.results.fairness import Arm
from lightning_base.results.read import Run, read_job


def read(path: Path) -> Run:
    run = read_job(path, path.name)
    assert isinstance(run, Run)
    return run


def test_a_router_keeps_its_colour_whatever_stands_beside_it(tmp_path: Path) -> None:
    base, switch = (Arm((read(write_run(tmp_path / name, name)),)) for name in ("BASE", "Switch"))
    assert styles([base, switch])[switch] == styles([switch])[switch]
    assert styles([switch])[switch]["color"].lower() == ROUTERS["Switch"][0].lower()
    assert router_color("ExpertChoice") == router_color("ExpertChoice")


def test_arms_of_one_router_differ_in_shade_and_line(tmp_path: Path) -> None:
    arms = [
        Arm((read(write_run(tmp_path / str(f), "Switch", changes={"router.capacity_factor": f})),))
        for f in (1.0, 2.0, 3.0)
    ]
    looks = styles(arms).values()
    assert len({look["color"] for look in looks}) == len({look["ls"] for look in looks}) == 3
    assert len({look["marker"] for look in looks}) == 1


def test_flops_are_steps_times_tokens_per_step_times_flops_per_token(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run"))
    # 16 tokens a step at 6000 FLOPs.
    assert cost(run, "FLOPs").tolist() == [96_000.0, 192_000.0, 288_000.0, 384_000.0]


def test_load_is_relative_to_an_even_share_from_the_fullest_expert_on(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run"))
    # [20, 10, 6, 4] of 40 tokens over 4 experts.
    found = run.counts["final_pass"]["layer_1"]
    assert fullest_first(found).tolist() == [[2.0, 1.0, 0.6, 0.4]] * 2
    # The same experts by other numbers: what one has been asked for stays beside what it computed.
    other = replace(found, demand=found.demand[:, [2, 0, 3, 1]], load=found.load[:, [2, 0, 3, 1]] - [0, 14, 0, 0])
    assert other.load[-1].tolist() == [6, 6, 4, 10]
    assert fullest_first(other).tolist() == [[1.0, 0.6, 2.0, 0.4], [1.0, 0.6, 0.6, 0.4]]


def test_arms_without_curves_or_counts_leave_the_other_figures_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "TopK", "TopK", without=("validation/loss",))
    (section,) = build(tmp_path).sections
    assert [p.name for p in pictures(section.comparison)] == ["load_bars", "load_over_time"]


def test_several_seeds_are_drawn(tmp_path: Path) -> None:
    write_seeds(tmp_path, BASE=(5.0, 6.0), Switch=(5.0, 6.5))
    (section,) = build(tmp_path).sections
    drawn = {picture.name: picture for picture in pictures(section.comparison)}
    assert next(iter(drawn)) == "difference"
    assert "an empty one is undecided" in drawn["difference"].caption
    assert "means over seeds" in drawn["loss_steps"].caption
    assert "Seed 1 of 2" in drawn["load_over_time"].caption
    assert b'id="difference1"' in drawn["difference"].svg


def test_one_seed_has_no_interval_in_its_figure(experiment: Path) -> None:
    (section,) = build(experiment).sections
    first = pictures(section.comparison)[0]
    assert "One seed" in first.caption
    assert b'id="difference1"' not in first.svg


def test_speeds_of_runs_that_shared_the_machine_are_marked(tmp_path: Path) -> None:
    for router, host in {"BASE": "a", "Switch": "a", "TopK": "b"}.items():
        run = write_run(tmp_path / router, router)
        for key, value in {"host": host, "started": 10.0, "updated": 20.0}.items():
            edit(run / "status.json", key, value)
    (section,) = build(tmp_path).sections
    (drawn,) = (picture for picture in pictures(section.comparison) if picture.name == "pareto")
    labels = re.findall(r"<!-- (\w+§?) -->", drawn.svg.decode())
    assert {"BASE§", "Switch§", "TopK"} <= set(labels)


def test_the_front_holds_what_no_other_point_beats() -> None:
    # Speed and loss: the last is beaten by the third, the fourth is as slow as the first and worse.
    points = [(1.0, 4.0), (3.0, 5.0), (2.0, 4.5), (1.0, 4.1), (2.0, 4.6)]
    assert pareto_front(points) == [0, 1, 2]
    assert pareto_front([(1.0, 4.0), (1.0, 4.0), (0.0, float("inf"))]) == [0, 1]
