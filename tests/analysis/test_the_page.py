"""What is written and said: page, figures, tables, and sentences for mistakes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import forks
import program
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_base.analysis.command import main
from lightning_base.analysis.tokens import printable_token
from lightning_base.program.checkpoint import VerifiedCheckpointIO

ANALYSIS = str(program.REPOSITORY / "experiments" / "analysis.py")


@pytest.fixture(scope="module")
def page(kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The page of top-k's run, made by the program as a user starts it, and what it printed."""
    folder = tmp_path_factory.mktemp("page") / "run"
    run = Path(shutil.copytree(kept["top_k"], folder, ignore=shutil.ignore_patterns("analysis")))
    stale = run / "analysis" / "stale.png"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"of an earlier analysis")
    (run / "analysis" / "notes.txt").write_text("mine")
    done = forks.run([ANALYSIS, run, "--sequences", "20"])
    assert done.returncode == 0, done.stderr
    return run / "analysis" / "analysis.html", done.stdout


def test_the_page_names_and_shows_every_figure_and_names_every_table(page: tuple[Path, str]) -> None:
    path, _ = page
    text = path.read_text()
    figures = sorted(file.name for file in path.parent.glob("*.png"))
    tables = sorted(file.name for file in path.parent.glob("*.csv"))
    assert figures == ["coactivation.png", "domains.png", "saturation.png", "switching.png", "vocabulary.png"]
    assert tables == [
        f"{name}.csv" for name in ("attracted", "coactivation", "domains", "summary", "training", "vocabulary")
    ]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert sorted(name for caption in captions for name in re.findall(r"\w+\.png", caption)) == figures
    assert text.count('src="data:image/svg+xml;base64,') == len(figures)
    files = text[text.index("Beside this page") :]
    assert all(name in files for name in [*figures, *tables])


def test_routing_that_looks_at_later_tokens_is_said_to(
    kept: dict[str, Path], page: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(kept["expert_choice"]), "--sequences", "20"]) == 0
    sentence = "routed as in evaluation, which for this router depends on later tokens (not causal)"
    assert sentence in capsys.readouterr().out
    assert sentence in (kept["expert_choice"] / "analysis" / "analysis.html").read_text()
    assert "not causal" not in page[1] + page[0].read_text()


def test_the_page_needs_nothing_but_itself(page: tuple[Path, str]) -> None:
    text = page[0].read_text()
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"<script|<link|<iframe|@import|url\(", text)
    assert "Not shown" not in text


def test_the_program_says_where_the_results_are(page: tuple[Path, str]) -> None:
    path, printed = page
    assert f"analysis: {path}" in printed
    assert printed.startswith("TopK with 8 experts, 2 per token, at step 4: 640 validation tokens")


def test_what_an_earlier_analysis_left_goes_and_what_is_not_ours_stays(page: tuple[Path, str]) -> None:
    left = {path.name for path in page[0].parent.iterdir()}
    assert "stale.png" not in left
    assert "notes.txt" in left


@pytest.mark.parametrize(("keep", "sentence"), [(1, "they need two"), (2, "two make no curve")])
def test_with_few_checkpoints_the_page_says_what_is_missing_and_how_to_get_it(
    keep: int, sentence: str, copy: Path
) -> None:
    for step in range(1, 5 - keep):
        shutil.rmtree(copy / "checkpoints" / f"step_{step}.ckpt")
    assert main([str(copy), "--sequences", "all"]) == 0
    text = (copy / "analysis" / "analysis.html").read_text()
    assert sentence in text
    assert f"{program.read(copy / 'manifest.json')['corpus']['validation_tokens']:,} validation tokens" in text
    assert "trainer.keep_checkpoints=null" in text
    assert "trainer.checkpoint_every_n_steps (it was 1)" in text
    assert "co-activation, because no token has more than one expert" in text
    assert not (copy / "analysis" / "saturation.png").exists()
    assert not (copy / "analysis" / "coactivation.png").exists()


def nothing(run: Path) -> None:
    shutil.rmtree(run)


def no_run(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.tex").write_text("mine")


def several_runs(run: Path) -> None:
    inner = run / "router=base"
    shutil.copytree(run, inner)
    (run / "status.json").unlink()


def unfinished(run: Path) -> None:
    status = program.read(run / "status.json")
    (run / "status.json").write_text(json.dumps({**status, "state": "preempted"}))


def broken_status(run: Path) -> None:
    (run / "status.json").write_text("{")


def broken_config(run: Path) -> None:
    (run / ".hydra" / "config.yaml").write_text("router: [")


def config_of_another_version(run: Path) -> None:
    config = run / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 4", "max_stepz: 4"))


def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def damaged_checkpoint(run: Path) -> None:
    with open(run / "checkpoints" / "step_2.ckpt" / "state.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"?")


def checkpoint_of_another_model(run: Path) -> None:
    path = run / "checkpoints" / "step_4.ckpt"
    content = program.state(path)
    del content["state_dict"]["model.blocks.layer_1.feed_forward.router.prices"]
    VerifiedCheckpointIO().save_checkpoint(content, path)


def replay_of_another_run(run: Path) -> None:
    source = run.with_name("source")
    shutil.copytree(run, source)
    path = run / ".hydra" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["router"] = {"_target_": "lightning_base.routing.replay.Replay", "source": str(source)}
    path.write_text(yaml.safe_dump(config))


def another_corpus(run: Path) -> None:
    manifest = program.read(run / "manifest.json")
    (run / "manifest.json").write_text(json.dumps({**manifest, "corpus_fingerprint": "0" * 64}))


def a_file_in_the_way(run: Path) -> None:
    shutil.rmtree(run / "analysis", ignore_errors=True)
    (run / "analysis").write_text("mine")


CASES: list[tuple[Callable[[Path], None], str]] = [
    (nothing, "is not a directory"),
    (no_run, "is not a run: it has no status.json"),
    (several_runs, "holds several runs, and one at a time is analysed: give "),
    (unfinished, "is preempted, not done: finish it"),
    (broken_status, "status.json cannot be read"),
    (broken_config, "cannot be read: "),
    (config_of_another_version, "trainer.max_stepz is no key of the configuration"),
    (no_checkpoint, "holds no checkpoint"),
    (damaged_checkpoint, "step_2.ckpt is damaged: state.pt is not what was written"),
    (checkpoint_of_another_model, "step_4.ckpt does not fit the model of this version"),
    (replay_of_another_run, "repeats what another one has routed, router.source="),
    (another_corpus, "the corpus is not the one"),
    (a_file_in_the_way, "the analysis cannot be written to"),
]


@pytest.mark.parametrize(("damage", "sentence"), CASES, ids=[damage.__name__ for damage, _ in CASES])
def test_bad_input_gets_one_sentence_and_exit_code_2(
    damage: Callable[[Path], None], sentence: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    capsys.readouterr()
    assert main([str(copy), "--sequences", "4"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert sentence in said[0]


def test_a_run_without_routing_is_refused_by_the_program_in_one_line(dense: Path) -> None:
    done = forks.run([ANALYSIS, dense])
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: the run {dense} has one expert per layer: there is no routing to analyse"
    ]
    assert not (dense / "analysis").exists()


@pytest.mark.parametrize("given", ["0", "-3", "many"])
def test_a_number_of_sequences_that_is_none_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", f"--sequences={given}"])
    assert stopped.value.code == 2
    assert f"'{given}' is no number of sequences: give 1 or more, or all" in capsys.readouterr().err


def test_a_near_name_is_suggested(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy.with_name("runn"))]) == 2
    assert capsys.readouterr().err.strip().endswith(f"did you mean {copy}?")


def test_tokens_are_shown_whole_in_signs_that_can_be_seen() -> None:
    # Letters of the byte-level alphabet: Ġ is a space, Ċ the end of a line, ĉ a tab; Ã by itself half of an é (C3 A9).
    words = ["<|endoftext|>", "Ġif", "ĊĉĠ", "Ã", "Ã©", "Ā", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    shown = [printable_token(tokenizer, i) for i in range(len(words) + 1)]
    assert shown == ["<|endoftext|>", "␣if", "↵⇥␣", r"\xc3", "é", r"\x00", "a", "<7>"]


def test_every_byte_has_the_letter_that_the_tokenizer_gives_it() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(sorted(alphabet))}, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    for token in range(len(alphabet)):
        decoded = tokenizer.decode([token])
        if decoded.isprintable() and decoded not in (" ", "\ufffd"):
            assert printable_token(tokenizer, token) == decoded
    assert len({printable_token(tokenizer, token) for token in range(256)}) == 256
