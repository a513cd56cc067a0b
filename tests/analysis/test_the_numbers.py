"""The tables of a real run, counted again with plain Python loops from the checkpoints and the validation split."""

import csv
import itertools
from collections import Counter
from pathlib import Path

import program
import pytest
import torch
import yaml

from lightning_base.analysis.command import main
from lightning_base.data import PreparedCorpus
from lightning_base.module import LanguageModel
from lightning_base.program.build import build_data
from lightning_base.program.read_config import read_config

SEQUENCES = 40
LENGTH = 32
BATCH = 16
Chosen = dict[str, list[tuple[int, ...]]]


class Recount:
    """What is known of every routed token, found without the code under test."""

    def __init__(self, run: Path) -> None:
        data = build_data(read_config(yaml.safe_load((run / ".hydra" / "config.yaml").read_text())))
        data.prepare_data()
        prepared = data.prepared
        assert isinstance(prepared, PreparedCorpus)
        split = prepared.validation
        # The text as the model reads it: an end of text, then the tokens.
        stream = [split.eos_id, *split.tokens.tolist()]
        documents = [d for d in range(split.documents) for _ in range(split.offsets[d], split.offsets[d + 1])]
        # The end of text in front belongs to the first document.
        domains = [int(split.domain_of_document[d]) for d in [documents[0], *documents]]
        whole = -(-len(split.tokens) // LENGTH)
        # All of these are full sequences: only the last of the split could be short.
        starts = [i * whole // SEQUENCES * LENGTH for i in range(SEQUENCES)]
        assert starts[-1] + LENGTH <= len(split.tokens)
        self.sequences = [stream[start : start + LENGTH] for start in starts]
        self.token = [token for sequence in self.sequences for token in sequence]
        self.before = [token for sequence in self.sequences for token in [None, *sequence[:-1]]]
        self.domain = [prepared.domains[d] for start in starts for d in domains[start : start + LENGTH]]

    def chosen(self, checkpoint: Path) -> Chosen:
        """The experts of every token in each layer."""
        model = LanguageModel.load_from_checkpoint(
            checkpoint / "state.pt", weights_only=True, map_location="cpu"
        ).eval()
        found: Chosen = {}
        for first in range(0, SEQUENCES, BATCH):
            ids = torch.tensor(self.sequences[first : first + BATCH])
            batch = {"input_ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)}
            with torch.no_grad():
                _, plans = model(batch)
            for layer, plan in plans.items():
                experts: list[list[int]] = [[] for _ in range(ids.numel())]
                for token, expert in zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True):
                    experts[token].append(expert)
                found.setdefault(layer, []).extend(tuple(sorted(e)) for e in experts)
        return found


@pytest.fixture(scope="module", params=["base", "top_k"])
def analysed(request: pytest.FixtureRequest, kept: dict[str, Path]) -> tuple[Path, Recount, dict[int, Chosen]]:
    """The tables' folder, the recount, and every token's experts at each checkpoint."""
    run = kept[request.param]
    assert main([str(run), "--sequences", str(SEQUENCES)]) == 0
    recount = Recount(run)
    steps = {step: recount.chosen(run / "checkpoints" / f"step_{step}.ckpt") for step in (1, 2, 3, 4)}
    return run / "analysis", recount, steps


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_layer_is_summarised(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, recount, steps = analysed
    rows = table(folder, "summary")
    assert [row["layer"] for row in rows] == list(steps[4])
    for row in rows:
        chosen = steps[4][row["layer"]]
        per_token = sum(map(len, chosen)) / len(chosen)
        assert int(row["tokens"]) == len(recount.token) == SEQUENCES * LENGTH
        assert float(row["experts_per_token"]) == per_token
        assert float(row["even"]) == pytest.approx(per_token / int(row["experts"]))
        assert float(row["dropped"]) == 0
        # Every token whose kind occurs ten times, and whether the favourite expert of that kind is among its own.
        often = {token: n for token, n in Counter(recount.token).items() if n >= 10}
        favourites = 0
        for token in often:
            at = Counter(e for t, experts in zip(recount.token, chosen, strict=True) if t == token for e in experts)
            favourites += at.most_common(1)[0][1]
        assert float(row["token_concentration"]) == pytest.approx(favourites / sum(often.values()))
        # The favourite of any labels takes at least an even share, because nothing is dropped.
        assert float(row["even"]) <= float(row["token_concentration_by_chance"]) <= 1


def test_shares_of_domains_agree_with_a_recount(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, recount, steps = analysed
    rows = table(folder, "domains")
    assert len({row["domain"] for row in rows}) > 1
    assert {row["domain"] for row in rows} == set(recount.domain)
    for row in rows:
        chosen = steps[4][row["layer"]]
        of_domain = [e for e, d in zip(chosen, recount.domain, strict=True) if d == row["domain"]]
        at_expert = sum(int(row["expert"]) in experts for experts in of_domain)
        assert (int(row["tokens"]), int(row["assignments"])) == (len(of_domain), at_expert)
        assert float(row["share"]) == pytest.approx(at_expert / len(of_domain))


def test_shares_of_the_vocabulary_agree_with_a_recount(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, recount, steps = analysed
    rows = table(folder, "vocabulary")
    for layer, chosen in steps[4].items():
        mine = [row for row in rows if row["layer"] == layer]
        assert {int(row["token_id"]): int(row["tokens"]) for row in mine} == Counter(recount.token)
        at: Counter = Counter()
        for token, experts in zip(recount.token, chosen, strict=True):
            at.update((token, expert) for expert in experts)
        for row in mine:
            token = int(row["token_id"])
            most = max(at[token, expert] for expert in range(8))
            assert at[token, int(row["expert"])] == int(row["assignments"]) == most
            assert float(row["share"]) == pytest.approx(most / int(row["tokens"]))


def test_what_experts_attract_agrees_with_a_recount(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, recount, steps = analysed
    # An expert that takes everything attracts nothing, and of such experts alone there is no table.
    rows = table(folder, "attracted") if (folder / "attracted.csv").exists() else []
    listed = {
        key: list(found) for key, found in itertools.groupby(rows, lambda r: (r["layer"], r["expert"], r["kind"]))
    }
    recounted = {}
    for layer, chosen in steps[4].items():
        for expert, (kind, labels) in itertools.product(
            range(8), {"token": recount.token, "preceding": recount.before}.items()
        ):
            known = [(x, e) for x, e in zip(labels, chosen, strict=True) if x is not None]
            in_text = Counter(x for x, _ in known)
            at_expert = Counter(x for x, experts in known if expert in experts)
            total = at_expert.total()
            lifts = {x: (at_expert[x] / total) / (n / len(known)) for x, n in in_text.items() if n >= 10 and total}
            attracted = sorted((value for value in lifts.values() if value > 1), reverse=True)
            if attracted:
                found = listed.get((layer, str(expert), kind), [])
                recounted[layer, str(expert), kind] = found
                assert [float(row["lift"]) for row in found] == pytest.approx(attracted[:25])
                for row in found:
                    assert float(row["lift"]) == pytest.approx(lifts[int(row["token_id"])])
                    assert int(row["tokens"]) == in_text[int(row["token_id"])]
                    assert int(row["assignments"]) == at_expert[int(row["token_id"])]
    assert listed == recounted
    assert listed or all(len(set(chosen)) == 1 for chosen in steps[4].values())


def test_pairs_of_experts_agree_with_a_recount(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, _, steps = analysed
    if all(len(experts) == 1 for chosen in steps[4].values() for experts in chosen):
        assert not (folder / "coactivation.csv").exists()
        return
    rows = table(folder, "coactivation")
    assert len(rows) == len(steps[4]) * 8 * 7
    for row in rows:
        i, j = int(row["expert"]), int(row["other"])
        with_i = [experts for experts in steps[4][row["layer"]] if i in experts]
        both = sum(j in experts for experts in with_i)
        assert (int(row["tokens"]), int(row["tokens_of_both"])) == (len(with_i), both)
        assert row["share"] == "" if not with_i else float(row["share"]) == pytest.approx(both / len(with_i))


def test_saturation_and_switching_agree_with_a_recount(analysed: tuple[Path, Recount, dict[int, Chosen]]) -> None:
    folder, _, steps = analysed
    rows = table(folder, "training")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4] * len(steps[4])
    for row in rows:
        step, layer = int(row["step"]), row["layer"]
        pairs = list(zip(steps[step][layer], steps[4][layer], strict=True))
        overlap = sum(len(set(now) & set(end)) / len(end) for now, end in pairs) / len(pairs)
        assert float(row["saturation"]) == pytest.approx(overlap)
        if step == 1:
            assert row["previous_step"] == row["switch_fraction"] == ""
            continue
        before = steps[int(row["previous_step"])][layer]
        changed = sum(a != b for a, b in zip(before, steps[step][layer], strict=True)) / len(before)
        assert int(row["previous_step"]) == step - 1
        assert float(row["switch_fraction"]) == pytest.approx(changed)
    # The test would prove little if routing never changed.
    assert any(float(row["switch_fraction"] or 0) > 0 for row in rows)


def test_the_token_tells_everything_of_a_hash_router_and_nothing_of_a_random_one(kept: dict[str, Path]) -> None:
    found = {}
    for router in ("hash", "random"):
        assert main([str(kept[router]), "--sequences", "200"]) == 0
        (found[router],) = table(kept[router] / "analysis", "summary")
    assert float(found["hash"]["token_concentration"]) == 1
    assert float(found["hash"]["token_concentration_by_chance"]) < 0.5
    for kind in ("token", "preceding", "domain"):
        shares = [float(found["random"][f"{kind}_concentration{end}"]) for end in ("", "_by_chance")]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_checkpoints_are_kept_as_configured(kept: dict[str, Path], dense: Path) -> None:
    for run in kept.values():
        assert sorted(path.stem for path in (run / "checkpoints").glob("*.ckpt")) == [f"step_{i}" for i in (1, 2, 3, 4)]
    assert [path.name for path in sorted((dense / "checkpoints").iterdir())] == ["step_4.ckpt"]


def test_keeping_no_checkpoint_is_refused(domain_corpus: list[str], tmp_path: Path) -> None:
    done = program.train(*domain_corpus, "trainer.keep_checkpoints=0", f"runs_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: trainer.keep_checkpoints=0 is out of range: give at least 1, or null to keep all"
    )
