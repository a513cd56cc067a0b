"""What the event files hold: as many tags whatever E and depth, a layout, cards, and rows for one HParams table.

N sparse layers, E experts.
"""

import io
import json
import statistics
from pathlib import Path

import matplotlib.image
import program
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_base.callbacks.tensorboard import over_layers, shown_layers

Events = dict[str, EventAccumulator]


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_layers_give_way_to_their_mean_and_max() -> None:
    values = {"a/gini/layer_1": 1.0, "a/gini/layer_3": 3.0, "a/gini/mean": 2.0, "a/gini/max": 3.0, "train/loss": 4.0}
    assert over_layers(values) == {"a/gini/mean": 2.0, "a/gini/max": 3.0, "train/loss": 4.0}


@pytest.mark.parametrize(
    ("layers", "shown"), [("a", "a"), ("ab", "ab"), ("abc", "abc"), ("abcd", "acd"), ("abcdefg", "adg")]
)
def test_histograms_are_of_the_first_the_middle_and_the_last_layer(layers: str, shown: str) -> None:
    assert shown_layers(list(layers)) == list(shown)


def test_more_layers_and_experts_give_no_more_scalars(events: Events) -> None:
    few, many = (set(events[arm].Tags()["scalars"]) for arm in ("base", "switch"))
    # What one of the two routers does not have: a solver, a capacity, a loss, gates that are probabilities.
    own = ("solve_time", "assignment_gain", "capacity", "load_balancing_loss", "gate_entropy")
    differ = [tag for tag in few ^ many if not any(name in tag for name in own)]
    assert differ == []
    assert not [tag for tag in few | many if "layer" in tag or tag.startswith("final")]
    assert len(few) < 200 > len(many)


def test_histograms_and_heatmaps_are_of_at_most_three_layers(events: Events, runs: dict[str, Path]) -> None:
    layers = {"base": ["layer_1", "layer_3"], "switch": ["layer_1", "layer_5", "layer_7"]}
    for arm, names in layers.items():
        tags = events[arm].Tags()
        stages = ["train_step", "validation_pass", "final_pass"] + ["final_balanced_pass"] * (arm == "base")
        assert sorted(tags["histograms"]) == sorted(f"expert_load/{s}/{layer}" for s in stages for layer in names)
        assert sorted(tags["images"]) == [*(f"expert_load_over_time/{n}" for n in names), "max_vio_over_time"]


def test_a_histogram_has_a_bin_per_expert_with_its_load(events: Events, runs: dict[str, Path]) -> None:
    with open(runs["switch"] / "expert_load.csv") as file:
        rows = [line.strip().split(",") for line in file]
    load = [int(row[5]) for row in rows if row[:3] == ["4", "final_pass", "layer_5"]]
    (histogram,) = events["switch"].Histograms("expert_load/final_pass/layer_5")
    assert len(load) == 16
    assert list(histogram.histogram_value.bucket) == load


def test_a_heatmap_of_many_experts_is_no_taller_than_a_screen(events: Events) -> None:
    for arm, height in (("base", 220), ("switch", 520)):
        image = events[arm].Images("expert_load_over_time/layer_1")[0]
        pixels = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
        # A quarter of an inch per expert, 100 pixels per inch, and 1.2 inches for the axis.
        assert pixels.shape[:2] == (height, 700)


def test_every_chart_of_the_layout_shows_one_scalar_of_every_arm(events: Events) -> None:
    for arm, found in events.items():
        (event,) = found.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        assert [category.title for category in layout.category] == ["Loss", "Balance", "Drop", "Throughput"]
        for category in layout.category:
            for chart in category.chart:
                (pattern,) = chart.multiline.tag
                tag = pattern.removeprefix("^").removesuffix("$")
                assert tag in found.Tags()["scalars"], (arm, chart.title)


def test_the_columns_of_the_hparams_table_do_not_depend_on_the_arm(events: Events) -> None:
    columns, shown = {}, {}
    for arm, found in events.items():
        metadata = found.summary_metadata
        content = metadata["_hparams_/experiment"].plugin_data.content
        experiment = HParamsPluginData.FromString(content).experiment
        columns[arm] = [info.name for info in experiment.hparam_infos]
        content = metadata["_hparams_/session_start_info"].plugin_data.content
        shown[arm] = HParamsPluginData.FromString(content).session_start_info.hparams
        assert set(shown[arm]) <= set(columns[arm])
        assert {info.name.tag for info in experiment.metric_infos} <= set(found.Tags()["scalars"])
    assert columns["base"] == columns["switch"]
    assert {"router.solver", "router.capacity_factor", "router.temperature"} <= set(columns["base"])
    assert shown["base"]["router.solver"].string_value == "transport"
    assert "router.solver" not in shown["switch"]
    assert shown["switch"]["router.capacity_factor"].number_value == 1.25
    assert shown["switch"]["options"].string_value.startswith("capacity_factor=1.25, ")


def test_the_results_in_the_table_are_those_of_the_run(events: Events, runs: dict[str, Path]) -> None:
    for arm, path in runs.items():
        manifest = program.read(path / "manifest.json")
        training = [value for _, value in program.series(path, "train_group/max_vio/demand/mean")]
        evaluation = program.series(path, "final_pass/max_vio/demand/mean")[-1][1]
        speed = [value for _, value in program.series(path, "train/tokens_per_second")]
        expected = {
            "loss": manifest["result"]["final/loss"],
            "bits_per_byte": manifest["result"]["final/bits_per_byte"],
            "max_vio_training": sum(training) / 3,
            "max_vio_evaluation": evaluation,
            "drop_rate": manifest["assignments_dropped"] / manifest["assignments"],
            # Logged after steps 1, 2 and 4; the first is a warm-up.
            "tokens_per_second": statistics.median(speed[1:]),
        }
        for name, value in expected.items():
            (event,) = events[arm].Scalars(f"result/{name}")
            assert event.step == 4
            assert event.value == pytest.approx(value, rel=1e-6, abs=1e-12), (arm, name)


def test_certificate_ledger_and_configuration_are_cards(events: Events, runs: dict[str, Path]) -> None:
    for arm, path in runs.items():
        manifest = program.read(path / "manifest.json")
        certificate, ledger = text(events[arm], "certificate"), text(events[arm], "ledger")
        for name in ("corpus_fingerprint", "initial_weights_fingerprint", "git_commit"):
            assert f"| `{name}` | `{manifest[name]}` |" in certificate
        assert f"| `packages.torch` | `{manifest['packages']['torch']}` |" in certificate
        assert f"| `active_parameters` | {manifest['ledger']['active_parameters']:,} |" in ledger
        assert f"| `model.depth` | {manifest['config']['model']['depth']} |" in text(events[arm], "configuration")
        assert f"| `batch_fingerprint` | `{manifest['batch_fingerprint']}` |" in text(events[arm], "result")


def test_whoever_reads_after_the_end_finds_all_of_it(runs: dict[str, Path]) -> None:
    # The rank leaves at once when it is done: nothing may be waiting to be written.
    for path in runs.values():
        assert json.loads((path / "status.json").read_text())["state"] == "done"
        assert "_hparams_/session_end_info" in EventAccumulator(str(path / "tensorboard")).Reload().summary_metadata
