"""What is written: a page that needs nothing else, Markdown with its figures, and sentences for mistakes."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from hand_made_runs import reseal, write_experiment, write_json, write_run

from lightning_base.report import write_report
from lightning_base.report.document import build
from lightning_base.report.write import find, main

ADDRESSES = ("src", "href", "srcset", "data", "action", "poster")


class Page(HTMLParser):
    """Collects tags, addresses and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ADDRESSES]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of two sound arms with their report, and what was printed."""
    folder = write_experiment(tmp_path_factory.mktemp("written") / "hand_made")
    with redirect_stdout(StringIO()) as printed:
        assert write_report(folder) == folder / "report.html"
    return folder, printed.getvalue()


def test_the_page_needs_nothing_but_itself(written: tuple[Path, str]) -> None:
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)


def test_a_page_has_all_figures_and_markdown_has_them_as_files(written: tuple[Path, str]) -> None:
    page = Page((written[0] / "report.html").read_text())
    names = ["difference", "load_bars", "load_over_time", "loss_flops", "loss_steps", "loss_time", "pareto"]
    assert sorted(path.stem for path in (written[0] / "report_files").glob("*.png")) == names
    text = (written[0] / "report.md").read_text()
    assert sorted(re.findall(r"\]\(report_files/(\w+)\.png\)", text)) == names
    assert page.tags.count("figure") == page.tags.count("figcaption") == 7


def test_the_answer_stands_first_with_one_figure_and_tables_are_files_too(written: tuple[Path, str]) -> None:
    text = (written[0] / "report.html").read_text()
    first = [text.index(mark) for mark in ("One seed does not support a ranking", "<figure", "<table", "<details>")]
    assert first == sorted(first)
    assert text[: text.index("<table")].count("<figure") == 1
    tables = {path.stem for path in (written[0] / "report_files").glob("*.tex")}
    assert {"the_arms", "quality_speed_and_cost_loss_against_speed"} <= tables
    assert {path.stem for path in (written[0] / "report_files").glob("*.csv")} == tables | {"numbers"}


def test_page_markdown_and_terminal_show_the_same_numbers(written: tuple[Path, str]) -> None:
    folder, printed = written
    page = Page((folder / "report.html").read_text())
    for text in (page.text, (folder / "report.md").read_text(), printed):
        text = text.replace(" %", "\u00a0%")
        assert all(number in text for number in ("4.5000", "5.0000", "18.75\u00a0%", "0.538")), text
    assert "report.html" in printed
    assert "report.md" in printed


def test_the_same_runs_give_the_same_bytes(written: tuple[Path, str], experiment: Path) -> None:
    assert write_report(experiment).read_bytes() == (written[0] / "report.html").read_bytes()


def test_what_comes_from_files_is_escaped_on_page_and_terminal(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert(1)</script>|`x`\x1b[2J"
    write_json(experiment / "sweep.json", {"jobs": {"router=base": evil, "router=switch": "switch", "gone": evil}})
    text = write_report(experiment).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    rows = [line for line in (experiment / "report.md").read_text().splitlines() if "alert" in line and line[0] == "|"]
    assert rows
    assert all("<script>" not in row.replace("\\<", "") for row in rows)
    printed = capsys.readouterr().out
    assert "alert(1)" in printed
    assert "\x1b" not in printed


def test_several_directories_make_one_report_beside_them(experiment: Path) -> None:
    other = experiment.parent / "more"
    write_run(other / "router=dense", "Dense", 4.8)
    path = write_report(experiment, other, quiet=True)
    assert path == experiment.parent / "hand_made+more" / "report.html"
    assert "Dense" in path.read_text()


def test_a_single_run_can_be_reported(experiment: Path) -> None:
    assert "no other arm" in write_report(experiment / "router=base").read_text()


def test_a_failed_job_is_on_the_page_with_its_traceback(experiment: Path) -> None:
    (experiment / "bad").mkdir()
    write_json(experiment / "bad" / "status.json", {"state": "failed", "error": "E: <hot>", "traceback": "at line 7"})
    page = Page(write_report(experiment).read_text())
    assert "E: <hot>" in page.text
    assert "at line 7" in page.text
    assert r"\<hot\>" in (experiment / "report.md").read_text()


def test_a_directory_that_is_not_there_is_one_sentence_with_near_names(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment.parent / "runs").mkdir()
    experiment.rename(experiment.parent / "runs" / "compare")
    monkeypatch.chdir(experiment.parent)
    assert main(["compair"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean compare?" in error
    assert find("compare") == find("runs/compare") == Path("runs/compare")


@pytest.mark.parametrize("content", ["nothing", "foreign", "unfinished", "refused", "deeper"])
def test_a_directory_without_a_finished_run_is_one_sentence(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job").mkdir()
    if content == "foreign":
        (tmp_path / "job" / "photo.jpg").write_bytes(b"\xff\xd8")
    if content == "unfinished":
        write_json(tmp_path / "job" / "status.json", {"state": "running"})
    if content == "refused":
        write_run(tmp_path / "other", manifest={"steps": 7})
    if content == "deeper":
        write_run(tmp_path / "compare" / "router=base")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    said = {"unfinished": "running", "refused": "steps", "deeper": "its folders compare do"}
    assert said.get(content, "holds no run") in error
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_read_is_said_and_the_rest_reported(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty directory beside a good one, a broken sweep.json, a job killed at its start, a broken event file."""
    (experiment.parent / "empty").mkdir()
    (experiment / "sweep.json").write_text("{")
    (experiment / "killed" / ".hydra").mkdir(parents=True)
    (experiment / "killed" / ".hydra" / "config.yaml").write_text("seed: 1")
    (experiment / "router=base" / "tensorboard").mkdir()
    (experiment / "router=base" / "tensorboard" / "events.out.tfevents.1").write_bytes(b"\x00garbage")
    assert main([str(experiment), str(experiment.parent / "empty")]) == 0
    printed = capsys.readouterr().out
    assert "BASE 5.0000 and Switch 4.5000" in printed
    listed = [line for line in printed.splitlines() if line.startswith("not in any table: ")]
    assert len(listed) == 3
    assert [("sweep.json" in listed[0]), ("killed" in listed[1]), ("empty" in listed[2])] == [True] * 3


@pytest.mark.parametrize(
    "file", ["metrics.csv", "expert_load.csv", "manifest.json", "status.json", ".hydra/config.yaml"]
)
@pytest.mark.parametrize("damage", ["cut", "binary", "words", "empty", "list", "number"])
def test_a_damaged_file_refuses_its_run_and_no_other(experiment: Path, file: str, damage: str) -> None:
    path = experiment / "router=switch" / file
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(
        {
            "cut": content[: len(content) * 2 // 3],
            "binary": b"\xff\x00" * 50,
            "words": lines[0] + b"one,two,three,four,five,six\n",
            "empty": b"",
            "list": b"[1, 2]",
            "number": b"7",
        }[damage]
    )
    document = build(experiment)
    assert [section.labels for section in document.sections] == [["base"]]
    (refused,) = document.left_out
    assert (refused.label, refused.reason != "") == ("switch", True)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--unknown"], 2), (["--help"], 0)])
def test_the_program_says_how_it_is_used(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    assert "usage" in "".join(capsys.readouterr())


def test_a_report_loads_no_training_code(experiment: Path) -> None:
    program = (
        "import json, sys; from lightning_base.report import write_report; "
        f"early = sorted(sys.modules); write_report({str(experiment)!r}, quiet=True); "
        "print(json.dumps([early, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    early, late = json.loads(done.stdout)
    assert not {"torch", "pytorch_lightning", "lightning_base.model", "matplotlib"} & set(early)
    assert not {"torch", "pytorch_lightning", "lightning_base.model", "matplotlib.pyplot"} & set(late)


def test_a_real_sweep_stands_in_one_table(small_sweep: Path) -> None:
    page = Page(write_report(small_sweep).read_text())
    assert "Not comparable" not in page.text
    assert "Not in any table" not in page.text
    assert "evaluation, balanced" in page.text
    assert "exactly even in base" in page.text
    assert page.tags.count("figure") == 9
    for title in (
        "What does balanced routing change?",
        "Does routing look ahead?",
        "Where does the time of a step go?",
    ):
        assert title in page.text


def test_a_real_run_with_an_altered_fingerprint_is_kept_out(small_sweep: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(small_sweep, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints"))
    (path,) = copied.glob("router=switch*/manifest.json")
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "batch_fingerprint": manifest["batch_fingerprint"][::-1]})
    (refused,) = build(copied).left_out
    assert "manifest.json is not what it was when the run ended" in refused.reason
    reseal(path.parent)
    text = Page(write_report(copied).read_text()).text
    assert "Not comparable with the first table" in text
    assert "batch_fingerprint: " in text
