"""Each alarm is forced, by a router that goes wrong in a real Trainer or in the real program. E = 8 experts."""

import json
import sys
from pathlib import Path

import forks
import program
import pytest
import pytorch_lightning as pl
import torch
from router_arms import ROUTERS, build_router
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import fit, language_model, leave, micro_batches
from torch import Tensor

from lightning_base.callbacks.alarms import Alarms, counts_of
from lightning_base.module import LanguageModel
from lightning_base.non_finite import NonFiniteError
from lightning_base.program.run_directory import RunDirectory, write_json
from lightning_base.routing import Router, RoutingGroups, RoutingPlan
from lightning_base.routing.plan import count_by_group

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


class GoesWrong(Router):
    """A test double: round-robin up to an optimizer step, and then whatever ``experts`` says of token t."""

    def __init__(self, after: int, experts: list[int]) -> None:
        super().__init__(num_experts=8)
        self.after, self.experts = after, experts
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.step += 1

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens))
        well = int(self.step) < self.after
        expert_index = token_index % 8 if well else torch.tensor(self.experts)[token_index % len(self.experts)]
        demand = count_by_group(groups, 8, token_index, expert_index)
        return RoutingPlan(token_index, expert_index, tokens.new_ones(len(tokens)), demand, groups)


def train(module: LanguageModel, folder: Path, steps: int, every: int = 1, **options: float) -> Alarms:
    write_json(folder / "status.json", {"state": "running", "pid": 123})
    alarms = Alarms(RunDirectory(folder), every, **options)
    fit(module, [batch for step in range(steps) for batch in micro_batches(step)], alarms)
    return alarms


def raised(folder: Path) -> dict[str, tuple[int, float]]:
    """Step and value of each alarm in status.json, by name."""
    status = program.read(folder / "status.json")
    assert status["pid"] == 123, "the status stays the launcher's"
    return {alarm["name"]: (alarm["step"], alarm["value"]) for alarm in status["alarms"]}


def with_router(router: Router, steps: int) -> LanguageModel:
    module = language_model("uniform", max_steps=steps)
    (layer,) = module.model.sparse_layers.values()
    layer.router = router
    return module


@pytest.mark.parametrize("router", ["uniform", "base", "switch", "top_k"])
def test_a_router_that_works_raises_none(router: str, tmp_path: Path) -> None:
    # Slowly: at 3e-3, top_k really does send 3.3 of at most 4 times an even share to one expert from step 4 on.
    alarms = train(language_model(router, max_steps=12, learning_rate=1e-4), tmp_path, 12)
    assert program.read(tmp_path / "status.json")["alarms"] == []
    assert alarms.active == []


def test_collapse_is_seen_within_the_intervals_it_promises(tmp_path: Path) -> None:
    # All tokens to expert 0 from the step after the 7th on; logs at 1, 2, 4, ..., each over 2 steps. The interval of
    # steps 7 and 8 is half collapsed: expert 0 has 1/8 and 1 of the tokens, 4.5 times the even share on average. So the
    # third collapsed check in a row is at 12, within 2 (3 + 1) steps of step 7.
    train(with_router(GoesWrong(after=7, experts=[0]), 14), tmp_path, 14, every=2)
    assert raised(tmp_path) == {"collapse": (12, 8.0)}


def test_a_collapse_that_passes_is_none(tmp_path: Path) -> None:
    class Recovers(GoesWrong):
        def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
            self.after = 99 if int(self.step) >= 4 else 2
            return super().forward(tokens, token_ids, groups)

    # Two checks in a row, of steps 3 and 4; three are needed.
    train(with_router(Recovers(after=2, experts=[0]), 8), tmp_path, 8)
    assert raised(tmp_path) == {}


def test_dead_experts_are_seen_when_the_window_is_over(tmp_path: Path) -> None:
    # Experts 6 and 7 get nothing after the second step; the others share evenly, 8/6 of an even share each.
    alarms = train(with_router(GoesWrong(after=2, experts=[0, 1, 2, 3, 4, 5]), 9), tmp_path, 9, dead_checks=5)
    assert raised(tmp_path) == {"dead_experts": (7, 2.0)}
    (alarm,) = alarms.alarms
    assert alarm.layer == "layer_1"
    assert "layer_1 has sent no token to 2 of 8 experts (6, 7) in 5 logged intervals" in alarm.sentence
    assert alarms.active == ["dead_experts"]


def saturated(router: str, **options: object) -> LanguageModel:
    """A model whose router has weights so large that its gates are all 0 or 1."""
    module = language_model(router, max_steps=4, learning_rate=1e-6, router_options=options)
    (layer,) = module.model.sparse_layers.values()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(1e4 * torch.randn_like(parameter))
    return module


LEARNING = [(name, {}) for name in ROUTERS if list(build_router(name).parameters()) and name != "gated_dense"]
LEARNING += [("top_k", {"gate": "sigmoid"}), ("top_k", {"gate": "sigmoid", "top_k": 1, "renormalize": False})]
LEARNING += [("sinkhorn", {"top_k": 2}), ("loss_free", {"renormalize": True}), ("switch", {"capacity_factor": 0.5})]


@pytest.mark.parametrize(("router", "options"), LEARNING, ids=str)
def test_every_router_that_learns_can_be_seen_saturated(router: str, options: dict, tmp_path: Path) -> None:
    train(saturated(router, **options), tmp_path, 4)
    step, value = raised(tmp_path)["saturation"]
    assert step == 3
    assert 0.99 < value <= 1


@pytest.mark.parametrize("router", [name for name in ROUTERS if not list(build_router(name).parameters())])
def test_a_router_without_parameters_has_nothing_to_saturate(router: str, tmp_path: Path) -> None:
    train(language_model(router, max_steps=4), tmp_path, 4)
    assert "saturation" not in raised(tmp_path)


@pytest.mark.parametrize(("gates", "expected"), [([0.0, 1.0, 0.5, 0.9], 3.4), ([0.25, 0.25], 1.5)], ids=str)
def test_a_sigmoid_gate_is_saturated_at_both_ends(gates: list[float], expected: float) -> None:
    # max(g, 1 - g): 1 + 1 + 0.5 + 0.9, and 0.75 twice.
    count = len(gates)
    plan = RoutingPlan(
        token_index=torch.arange(count),
        expert_index=torch.zeros(count, dtype=torch.int64),
        weight=torch.ones(count),
        group_demand=torch.tensor([[count, 0]]),
        groups=RoutingGroups((count,)),
        aux={"gates": torch.tensor(gates), "probabilities": torch.full((count, 2), 0.5)},
    )
    counts = counts_of(plan, with_gates=True)
    assert counts.tolist() == pytest.approx([len(gates), 0, expected, len(gates)])


@pytest.mark.parametrize(("experts", "k", "limit"), [(8, 1, 4.0), (8, 2, 3.25), (4, 2, 1.75), (5, 4, 1.1875)])
def test_few_experts_or_many_choices_can_collapse_too(experts: int, k: int, limit: float, tmp_path: Path) -> None:
    # Three quarters of the way from 1 to E / k, at most 4 times.
    router = build_router("random", num_experts=experts, top_k=k)
    for share, found in ((0.98, []), (1.02, ["collapse"])):
        most = share * limit
        rest = (experts - most) / (experts - 1)
        counts = torch.tensor([most, *[rest] * (experts - 1), 0.0, 0.0], dtype=torch.float64)
        alarms = Alarms(RunDirectory(tmp_path), 1, checks=1)
        assert [alarm.name for alarm in alarms._check("layer_1", counts, router, 1)] == found


def test_a_saturated_router_is_seen_and_told_what_would_help(tmp_path: Path) -> None:
    alarms = train(saturated("switch"), tmp_path, 4)
    step, value = raised(tmp_path)["saturation"]
    assert step == 3
    assert 0.99 < value <= 1
    (alarm,) = [alarm for alarm in alarms.alarms if alarm.name == "saturation"]
    # Switch has no z-loss whose coefficient could be raised.
    assert "take a router with a z-loss, or lower module.learning_rate" in alarm.sentence


def test_one_expert_of_one_is_neither_collapsed_nor_saturated(tmp_path: Path) -> None:
    train(language_model("dense", max_steps=4), tmp_path, 4)
    assert raised(tmp_path) == {}


class Poison(pl.Callback):
    """Makes a router's weights NaN before a step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        if i == 2:
            (layer,) = pl_module.model.sparse_layers.values()
            with torch.no_grad():
                next(layer.router.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("router", ["switch", "base"])
def test_gates_that_are_not_finite_are_named_in_the_step_that_fails(router: str, tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "pid": 123})
    module = language_model(router, max_steps=4)
    batches = [batch for step in range(4) for batch in micro_batches(step)]
    alarms = Alarms(RunDirectory(tmp_path), 1)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        fit(module, batches, alarms, Poison())
    assert alarms.active == ["non_finite_gates"], "what the progress bar shows"
    (alarm,) = program.read(tmp_path / "status.json")["alarms"]
    assert (alarm["name"], alarm["layer"], alarm["step"]) == ("non_finite_gates", "layer_1", 3)
    assert alarm["value"] > 0
    assert "layer_1 has gates that are not finite at step 3" in alarm["sentence"]


def test_alarms_and_streaks_go_on_after_a_resume(tmp_path: Path) -> None:
    before = train(with_router(GoesWrong(after=0, experts=[0]), 4), tmp_path, 4, dead_checks=6)
    after = Alarms(RunDirectory(tmp_path), 1, dead_checks=6)
    after.load_state_dict(before.state_dict())
    module = with_router(GoesWrong(after=0, experts=[0]), 2)
    fit(module, [batch for step in range(2) for batch in micro_batches(step)], after)
    # Collapsed since the third step before; dead in the sixth check, which is the second after.
    assert [alarm.name for alarm in after.alarms] == ["collapse", "dead_experts"]
    assert raised(tmp_path).keys() == {"collapse", "dead_experts"}


def test_the_launcher_keeps_alarms_in_the_final_status(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("running")
    run.write_alarms([{"name": "collapse"}])
    run.write_status("done")
    assert run.status()["alarms"] == [{"name": "collapse"}]
    assert run.status()["state"] == "done"


# On two ranks


def on_rank(folder: str) -> None:
    """What each of two processes does: an arm in which only both ranks together reach all experts, and a collapse."""
    rank = int(torch.distributed.get_rank())
    found = {}
    for name, experts in (("halves", [4 * rank + i for i in range(4)]), ("collapse", [rank, rank])):
        alarms = Alarms(RunDirectory(Path(folder, f"{name}_{rank}")), 1, dead_checks=4, collapse_factor=3)
        batches = [batch for step in range(5) for batch in micro_batches(step, world_size=2, rank=rank)]
        fit(with_router(GoesWrong(0, experts), 5), batches, alarms, world_size=2)
        found[name] = [(alarm.name, alarm.step, alarm.value) for alarm in alarms.alarms]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave()


def test_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    code = (
        "import torch; torch.distributed.init_process_group('gloo'); torch.set_num_threads(1); "
        f"import test_alarms; test_alarms.on_rank({str(tmp_path)!r})"
    )
    here = Path(__file__).parent
    environment = {**program.environment(), "PYTHONPATH": f"{program.REPOSITORY}:{here}:{here.parent}"}
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    done = forks.run([*command, sys.executable, "-c", code], environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (program.read(tmp_path / f"{rank}.json") for rank in range(2))
    assert first == second
    # Half of the experts are idle on each rank, and none of all; 2 times an even share on each rank, and 1 on both.
    assert first["halves"] == []
    # Each rank sends all to one expert: 8 times on a rank, 4 times over both; 6 experts are dead.
    assert first["collapse"] == [["collapse", 3, 4.0], ["dead_experts", 4, 6.0]]
    statuses = [tmp_path / f"collapse_{rank}" / "status.json" for rank in range(2)]
    assert [path.exists() for path in statuses] == [True, False], "the first rank writes"


# Through the real program


@pytest.fixture(scope="module")
def skewed(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of a router that sends all tokens to expert 0, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("skewed")
    options = ("trainer.max_steps=12", "trainer.validate_every_n_steps=12", "model.depth=4")
    done = program.train(*small_corpus, *options, "router=skewed", f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder), done.stdout + done.stderr


def test_a_run_with_alarms_goes_on_and_says_so_in_its_status(skewed: tuple[Path, str]) -> None:
    status = program.read(skewed[0] / "status.json")
    assert status["state"] == "done"
    assert [(alarm["name"], alarm["layer"], alarm["step"], alarm["value"]) for alarm in status["alarms"]] == [
        ("collapse", "layer_1", 3, 8.0),
        ("collapse", "layer_3", 3, 8.0),
        ("dead_experts", "layer_1", 10, 7.0),
        ("dead_experts", "layer_3", 10, 7.0),
    ]
    assert "layer_1 sends 8.0 times an even share to expert 0" in status["alarms"][0]["sentence"]


def test_alarms_are_curves_and_texts(skewed: tuple[Path, str]) -> None:
    found = dict(program.series(skewed[0], "alarm/collapse"))
    # In how many of the two layers.
    assert found == {step: 2.0 * (step >= 3) for step in range(1, 13)}
    events = EventAccumulator(str(skewed[0] / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("alarm/dead_experts")] == [0.0] * 9 + [2.0] * 3
    # All so far in one text: of two texts with one tag TensorBoard may show the later alone.
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("alarms/text_summary")}
    assert sorted(texts) == [3, 10]
    for layer in ("layer_1", "layer_3"):
        sentence = f"- step 3, collapse: {layer} sends 8.0 times an even share"
        assert sentence in texts[3]
        assert sentence in texts[10]
        assert f"- step 10, dead_experts: {layer} has sent no token to 7 of 8" in texts[10]


def test_the_progress_bar_shows_what_rings(skewed: tuple[Path, str]) -> None:
    assert "ALARM=collapse+dead_experts" in skewed[1]
