"""Adding seeds to an experiment trains only those that are new."""

from pathlib import Path

import program

from lightning_base.report.document import build

ARMS = ("router=uniform", "trainer.max_steps=2", "name=seeds")


def test_the_first_seed_is_not_trained_again(small_corpus: list[str], tmp_path: Path) -> None:
    first = program.train("-m", *small_corpus, *ARMS, f"runs_dir={tmp_path}")
    assert first.returncode == 0, first.stderr
    folders = program.jobs(tmp_path, "seeds")
    assert len(folders) == 1
    assert all(name.endswith(",seed=1") for name in folders)
    manifests = {name: (path / "manifest.json").stat().st_mtime_ns for name, path in folders.items()}

    more = program.train("-m", *small_corpus, *ARMS, "seed=1,2", f"runs_dir={tmp_path}")
    assert more.returncode == 0, more.stderr
    folders = program.jobs(tmp_path, "seeds")
    assert sorted(name.rpartition("seed=")[2] for name in folders) == ["1", "2"]
    assert {name: (folders[name] / "manifest.json").stat().st_mtime_ns for name in manifests} == manifests
    seeds = {program.read(path / "manifest.json")["seed"] for path in folders.values()}
    assert seeds == {1, 2}

    # A command of its own for one more arm leaves the others their labels.
    hashed = ("router=hash,uniform", *ARMS[1:], f"runs_dir={tmp_path}")
    last = program.train("-m", *small_corpus, *hashed)
    assert last.returncode == 0, last.stderr
    sweep = program.read(tmp_path / "seeds" / "sweep.json")
    assert sorted(sweep["jobs"].values()) == ["hash", "uniform"]
    assert len(sweep["earlier"]) == 1
    (section,) = build(tmp_path / "seeds").sections
    assert sorted(section.labels) == ["hash", "uniform"]
