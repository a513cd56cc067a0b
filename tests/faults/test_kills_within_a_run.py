"""SIGKILL at every stage of a save and of an evaluation: no row of any log is lost or doubled, no count is wrong.

And a run that goes on with other ranks and another accumulation is the same run.
"""

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import program
import pytest
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator

STEPS = 6
ARGUMENTS = (
    "router=killing",
    f"trainer.max_steps={STEPS}",
    "trainer.keep_checkpoints=1",
    "trainer.progress_bar=false",
)
# Each start of the command gets as far as the next place: after a checkpoint and before its validation; with half of a
# part written; before the checkpoint is moved into its place; after it, with the one before not yet removed; in the
# last validation, with nothing left to train; with some rows of the final evaluation written.
PLACES = ("evaluation_2", "part_4", "rename_4", "renamed_4", "evaluation_4", "evaluation_6", "final")
SHORT = ("evaluation_2", "rename_4", "renamed_4", "evaluation_6", "final")
TWO_RANKS = ("strategy=ddp", "trainer.devices=2", "strategy.timeout_seconds=60")
SHARED_EXPERTS = ("strategy=expert_parallel", *TWO_RANKS[1:])
# What is measured with a clock; the machine's speed is not even measured at the same steps.
CLOCKS = ("train/step_time", "train/tokens_per_second", "train/memory_mb", "train_time/", "machine/")
CLOCKS += ("communication/seconds", "communication/share", "communication/waiting")


def killing(folder: Path, places: tuple[str, ...] = ()) -> Path:
    """A folder with the router and its plan."""
    (folder / "router").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("killing_router.py"), folder / "killing.py")
    yaml = "_target_: lightning_base.routing.killing.Killing\nnum_experts: 8\n"
    (folder / "router" / "killing.yaml").write_text(yaml)
    (folder / "plan").write_text("\n".join(places))
    return folder


def rows(run: Path) -> dict[str, list[tuple[str, ...]]]:
    """The rows of every log of a run, sorted, without clocks."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for path in sorted(run.glob("*.csv")):
        with open(path, newline="") as file:
            read = [row for row in csv.DictReader(file) if not row.get("name", "").startswith("machine/")]
        for row in read:
            for clock in ("seconds", "waiting"):
                row.pop(clock, None)
            if row.get("name", "").startswith(CLOCKS):
                row["value"] = "measured"
        found[path.name] = sorted(tuple(row.values()) for row in read)
    return found


def events(run: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The steps and values of all that TensorBoard shows of a run, by tag; without clocks, and of text the steps."""
    read = EventAccumulator(str(run / "tensorboard"), dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0)).Reload()
    tags = read.Tags()
    found: dict[str, list[tuple[Any, ...]]] = {}
    for tag in tags["scalars"]:
        measured = tag.startswith((*CLOCKS, "result/tokens_per_second"))
        found[tag] = [(event.step, "measured" if measured else event.value) for event in read.Scalars(tag)]
    found |= {
        tag: [(event.step, event.histogram_value) for event in read.Histograms(tag)] for tag in tags["histograms"]
    }
    found |= {tag: [(event.step, event.encoded_image_string) for event in read.Images(tag)] for tag in tags["images"]}
    found |= {tag: [(event.step,) for event in read.Tensors(tag)] for tag in tags["tensors"]}
    return {tag: shown for tag, shown in found.items() if not tag.startswith("machine/")}


@pytest.fixture(scope="module")
def undisturbed(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = killing(tmp_path_factory.mktemp("undisturbed"))
    done = program.train(*small_corpus, *ARGUMENTS, f"hydra.run.dir={folder}/run", routers=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("places", "ranks"),
    [
        (SHORT, ()),
        pytest.param(PLACES, (), marks=pytest.mark.exhaustive),
        pytest.param(PLACES, TWO_RANKS, marks=pytest.mark.exhaustive),
        pytest.param(PLACES, SHARED_EXPERTS, marks=pytest.mark.exhaustive),
    ],
    ids=["short", "one_rank", "two_ranks", "shared_experts"],
)
def test_no_row_is_lost_or_doubled_by_a_kill_at_any_stage(
    places: tuple[str, ...], ranks: tuple[str, ...], small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    if ranks:
        other = killing(tmp_path / "other")
        done = program.train(*small_corpus, *ARGUMENTS, *ranks, f"hydra.run.dir={other}/run", routers=other)
        assert done.returncode == 0, done.stderr
        undisturbed = other / "run"
    folder, run = killing(tmp_path / "killed", places), tmp_path / "killed" / "run"
    for n, place in enumerate(places):
        done = program.train(*small_corpus, *ARGUMENTS, *ranks, f"hydra.run.dir={run}", routers=folder)
        # One rank trains in the process of the command; of two, the launcher is left to say so.
        assert done.returncode == (1 if ranks else -signal.SIGKILL), (place, done.stderr)
        assert (folder / "plan").read_text().split() == list(places[n + 1 :]), place
        assert program.read(run / "status.json")["state"] == ("failed" if ranks else "running")
        if place == "renamed_4":
            assert len(list((run / "checkpoints").glob("step_*.ckpt"))) == 2
    done = program.train(*small_corpus, *ARGUMENTS, *ranks, f"hydra.run.dir={run}", routers=folder)
    assert done.returncode == 0, done.stderr
    expected, found = rows(undisturbed), rows(run)
    exchanged = {"communication.csv"} if ranks == SHARED_EXPERTS else set()
    logs = {"compute_balance.csv", "drop_by_position.csv", "expert_load.csv", "metrics.csv"}
    assert set(expected) == logs | exchanged
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == expected[name], name
    expected_events, found_events = events(undisturbed), events(run)
    assert set(found_events) == set(expected_events)
    for tag, shown in expected_events.items():
        assert found_events[tag] == shown, tag
    # Nothing of any killed save is left, and no checkpoint that the run did not want to keep.
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{STEPS}.ckpt"]
    before, after = (program.read(path / "manifest.json") for path in (undisturbed, run))
    for field in (
        "batch_fingerprint",
        "sequences",
        "tokens",
        "assignments",
        "assignments_dropped",
        "result",
        "layouts",
    ):
        assert after[field] == before[field], field
    # 6 steps of 16 sequences of 32 tokens, in one sparse layer.
    assert after["tokens"] == after["assignments"] == STEPS * 16 * 32
    resumed = {"evaluation_2": 2, "part_4": 2, "rename_4": 2, "renamed_4": 4, "evaluation_4": 4}
    assert [resume["step"] for resume in after["resumes"]] == [resumed.get(place, STEPS) for place in places]


def test_a_run_may_go_on_with_other_ranks_and_another_accumulation(
    small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    folder, run = killing(tmp_path / "moved", ("evaluation_2", "part_6")), tmp_path / "moved" / "run"
    layouts = (TWO_RANKS, ("trainer.accumulate_grad_batches=2",), ())
    for layout, code in zip(layouts, (1, -signal.SIGKILL, 0), strict=True):
        done = program.train(*small_corpus, *ARGUMENTS, *layout, f"hydra.run.dir={run}", routers=folder)
        assert done.returncode == code, done.stderr
    before, after = (program.read(path / "manifest.json") for path in (undisturbed, run))
    assert after["layouts"] == [
        {"from_step": 0, "world_size": 2, "strategy": "ddp", "accumulation": 1},
        {"from_step": 2, "world_size": 1, "strategy": "single", "accumulation": 2},
        {"from_step": 4, "world_size": 1, "strategy": "single", "accumulation": 1},
    ]
    for field in ("batch_fingerprint", "sequences", "tokens", "assignments"):
        assert after[field] == before[field], field
    # Additions in another order may move a token from one expert to another.
    assert after["assignments_dropped"] == pytest.approx(before["assignments_dropped"], rel=0.01)
    for name in ("train/loss", "validation/loss", "final/loss"):
        expected, found = program.series(undisturbed, name), program.series(run, name)
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5), name


def test_what_changes_the_run_itself_is_still_refused(small_corpus: list[str], undisturbed: Path) -> None:
    folder = undisturbed.parent
    changed = (*ARGUMENTS, "trainer.devices=2", "strategy=ddp", "seed=2", "data.global_batch=32")
    done = program.train(*small_corpus, *changed, f"hydra.run.dir={undisturbed}", routers=folder)
    assert done.returncode == 2
    assert "holds a run with data.global_batch=16, not 32; seed=1, not 2: choose" in done.stderr
