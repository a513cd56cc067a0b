"""Routers of another package: named on the command line, written into the certificate, refused where not declared."""

import sys
from pathlib import Path

import forks
import program
import pytest
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException

from lightning_base.instantiation import ConfigError
from lightning_base.program import plugins
from lightning_base.program.explain import explain

SOURCE = '''
from dataclasses import replace

import torch
from pytorch_lightning import Callback
from lightning_base import Router, RoutingPlan
from lightning_base.routing.plan import count_by_group


class MyRouter(Router):
    """The expert is the token's number, moved by an offset."""

    def __init__(self, *, num_experts: int, offset: int = 1) -> None:
        super().__init__(num_experts=num_experts)
        self.offset = offset

    def forward(self, tokens, token_ids, groups):
        token_index = torch.arange(len(tokens))
        expert_index = (token_ids + self.offset) % self.num_experts
        demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=demand,
            groups=groups,
        )


class NoRouter:
    pass


class Outer:
    class Inner(MyRouter):
        pass


class NoForward(Router):
    def __init__(self, *, num_experts: int) -> None:
        super().__init__(num_experts=num_experts)


class Pair(NoForward):
    def forward(self, tokens, token_ids, groups):
        return tokens, token_ids


class Beyond(MyRouter):
    def forward(self, tokens, token_ids, groups):
        return replace(super().forward(tokens, token_ids, groups), expert_index=token_ids * 0 + 99)


class Picky(MyRouter):
    def __init__(self, *, num_experts: int) -> None:
        assert num_experts == 4
        super().__init__(num_experts=num_experts)


class BadCallback(Callback):
    def __init__(self):
        raise RuntimeError("no\\nluck")


class MyCallback(Callback):
    def __init__(self, path, clock, word="steps"):
        self.path, self.clock, self.word = path, clock, word

    def on_train_end(self, trainer, module):
        self.path.write_text(f"{trainer.global_step} {self.word}, {self.clock.seconds > 0}")

    @property
    def results(self):
        return {"final/mine": 7.0}
'''


def install(folder: Path, package: str, name: str | None = None) -> None:
    """A package with a router in ``folder``; with ``name``, as installed with an entry point of that name."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(SOURCE)
    if name is not None:
        information = folder / f"{package}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (information / "top_level.txt").write_text(f"{package}\n")
        (information / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {package}:MyRouter\n")


def test_a_sweep_over_a_router_of_ours_and_one_of_theirs(small_corpus: list[str], tmp_path: Path) -> None:
    install(tmp_path / "site", "their_package")
    install(tmp_path / "site", "installed_package", "theirs")
    arguments = (
        "-m",
        *small_corpus,
        "plugins=[their_package]",
        "router=their_package.MyRouter,theirs",
        "++router.offset=3",
        "~callbacks.alarms",
        "+callbacks.mine._target_=their_package.MyCallback",
        "trainer.max_steps=2",
        f"runs_dir={tmp_path}",
    )
    with_packages = {**program.environment(), "PYTHONPATH": f"{program.REPOSITORY}:{tmp_path / 'site'}"}
    done = forks.run(program.command(*arguments), environment=with_packages)
    assert done.returncode == 0, done.stderr
    by_router = {
        program.read(path)["config"]["router"]["_target_"]: program.read(path)
        for path in tmp_path.rglob("manifest.json")
    }
    assert set(by_router) == {"their_package.MyRouter", "installed_package.MyRouter"}
    for manifest in by_router.values():
        assert (manifest["ledger"]["router"], manifest["ledger"]["num_experts"]) == ("MyRouter", 8)
        assert manifest["config"]["router"]["offset"] == 3
        # Theirs is called with what it asks for by name, and what it measured stands among the results.
        assert "alarms" not in manifest["config"]["callbacks"]
        assert manifest["result"]["final/mine"] == 7.0
    written = [path.read_text() for path in tmp_path.rglob("mine.csv")]
    assert written == ["2 steps, True"] * 2
    found = by_router["installed_package.MyRouter"]["plugin"]
    assert (found["package"], found["version"]) == ("installed_package", "1.2")
    # The two packages have the same source, and no compiled file or folder name is in the hash.
    assert found["source_sha256"] == by_router["their_package.MyRouter"]["plugin"]["source_sha256"]
    assert by_router["their_package.MyRouter"]["plugin"]["version"] == "none"


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (
            ("router=switch,their_package.Picky",),
            "router._target_=their_package.Picky cannot be built: it raised AssertionError: without a message (line ",
        ),
        (
            ("router=base,switch", "+callbacks.bad._target_=their_package.BadCallback"),
            "callbacks.bad._target_=their_package.BadCallback cannot be built: it raised RuntimeError: no luck (line ",
        ),
        (
            ("router=switch,their_package.NoForward",),
            "router._target_=their_package.NoForward has no forward of its own: define one that gives a RoutingPlan",
        ),
    ],
    ids=["router", "callback", "forward"],
)
def test_no_arm_of_a_sweep_starts_where_an_init_of_theirs_raises(
    mistake: tuple[str, ...], sentence: str, small_corpus: list[str], tmp_path: Path
) -> None:
    install(tmp_path / "site", "their_package")
    given = ("-m", *small_corpus, "plugins=[their_package]", *mistake, f"runs_dir={tmp_path}/runs")
    with_packages = {**program.environment(), "PYTHONPATH": f"{program.REPOSITORY}:{tmp_path / 'site'}"}
    done = forks.run(program.command(*given), environment=with_packages)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith(f"error: {sentence}")) == (2, True), line
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_is_none_names_the_router(small_corpus: list[str], tmp_path: Path) -> None:
    install(tmp_path / "site", "their_package")
    routers = "router=their_package.Pair,their_package.Beyond"
    given = ("-m", *small_corpus, "plugins=[their_package]", routers, f"runs_dir={tmp_path}/runs")
    with_packages = {**program.environment(), "PYTHONPATH": f"{program.REPOSITORY}:{tmp_path / 'site'}"}
    done = forks.run(program.command(*given), environment=with_packages)
    pair, beyond = done.stderr.splitlines()[-2:]
    assert pair.endswith("TypeError: Pair.forward gave a tuple, and not a RoutingPlan")
    assert beyond.endswith("(Beyond.forward gave expert_index=99: experts are numbered from 0 to 7)")


def test_the_hash_of_a_source_changes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "changing_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = plugins.source_hash("changing_package")
    with open(tmp_path / "changing_package" / "__init__.py", "a") as file:
        file.write("# more\n")
    assert plugins.source_hash("changing_package") != before


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path, "declared_package")
    (tmp_path / "broken_package.py").write_text("1 / 0\n")
    (tmp_path / "leaving_package.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "declared_package" / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("declared_package", "shadowing_package", "twice_package"):
        sys.modules.pop(name, None)


MISTAKES = {
    "not declared": (["router=declared_package.MyRouter"], "is not declared: add plugins=[declared_package]"),
    "another package is": (
        ["plugins=[declared_package]", "router=base,json.JSONDecoder"],
        "router=json.JSONDecoder is of a package that is not declared",
    ),
    "not installed": (["plugins=[nowhere_package]"], "plugins=nowhere_package cannot be imported (ModuleNotFoundError"),
    "does not import": (["plugins=[broken_package]"], "broken_package cannot be imported (ZeroDivisionError"),
    "ends the process": (["plugins=[leaving_package]"], "leaving_package cannot be imported (SystemExit: 3)"),
    "a module of it does not import": (
        ["plugins=[declared_package]", "router=declared_package.broken_module.MyRouter"],
        "broken_module.MyRouter cannot be imported (ZeroDivisionError: division by zero): mend it first",
    ),
    "ours": (["plugins=[lightning_base.program.rank]"], "plugins=lightning_base.program.rank is no package of yours"),
    "no router": (["plugins=[declared_package]", "router=declared_package.NoRouter"], "is not a Router"),
    "what it imports": (
        ["plugins=[declared_package]", "router=declared_package.RoutingPlan"],
        "it only passes through declared_package",
    ),
    "no such class": (
        ["plugins=[declared_package]", "router=declared_package.MyRoute"],
        "has no attribute 'MyRoute'; did you mean MyRouter?",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_router_that_cannot_be_used_is_refused(case: str, site: Path) -> None:
    arguments, sentence = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        plugins.store_routers(arguments, ["base"])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_installed_router_is_a_choice_and_may_be_a_class_within_a_class(site: Path) -> None:
    install(site, "declared_package_too", "mine = declared_package_too:Outer.Inner\nhalf")
    points = site / "declared_package_too-1.2.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace(":MyRouter", ""))
    plugins.store_routers(["router=mine"], ["base"])
    stored = ConfigStore.instance().load("router/mine.yaml").node
    assert stored == {"_target_": "declared_package_too.Outer.Inner", "num_experts": 8, "offset": 1}
    for name, sentence in {
        "min": "router=min does not exist; did you mean mine?",
        "half": "router=half cannot be used: its entry point of lightning_base.routers is declared_package_too, which "
        "names no class: write half = declared_package_too:MyRouter",
    }.items():
        assert explain(MissingConfigException("", f"router/{name}", ["base"])) == sentence


def test_an_installed_router_may_not_have_the_name_of_ours_or_of_another(site: Path) -> None:
    install(site, "shadowing_package", "base")
    with pytest.raises(ConfigError, match="has the name of a router of lightning_base"):
        plugins.store_routers([], ["base"])
    install(site, "twice_package", "base")
    with pytest.raises(ConfigError, match="two installed packages name a router base"):
        plugins.store_routers([], [])


@pytest.mark.parametrize(
    ("installed", "arguments", "sentence"),
    [
        (
            {},
            ["plugins=[broken_package]", "router=broken_package.MyRouter"],
            "plugins=broken_package cannot be imported",
        ),
        (
            {},
            ["plugins=[declared_package]", "router=declared_package.NoRouter"],
            "declared_package.NoRouter is not a Router",
        ),
        ({"one_package": "base"}, ["router=base"], "the router base of one_package.MyRouter"),
        ({"one_package": "mine", "two_package": "mine"}, ["router=mine"], "two installed packages name a router mine"),
    ],
    ids=["does not import", "no router", "a name of ours", "one name twice"],
)
def test_the_command_answers_with_one_sentence_and_exit_code_2_before_it_writes_anything(
    installed: dict[str, str], arguments: list[str], sentence: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, name in installed.items():
        install(site, package, name)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    done = program.train(*arguments, f"runs_dir={site}/runs")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (site / "runs").exists()


@pytest.mark.parametrize("way", ["--config-dir", "hydra.searchpath"])
def test_a_file_with_the_name_of_one_of_ours_is_refused_by_both_names(way: str, tmp_path: Path) -> None:
    theirs = tmp_path / "my_conf" / "router" / "base.yaml"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("_target_: declared_package.MyRouter\noffset: 3\n")
    where = (
        [f"--config-dir={tmp_path / 'my_conf'}"] if way == "--config-dir" else [f"{way}=[file://{tmp_path}/my_conf]"]
    )
    # Hydra would read ours, in which there is no such option.
    done = program.train(*where, "router=base", "router.offset=4", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    ours = program.REPOSITORY / "lightning_base" / "conf" / "router" / "base.yaml"
    assert line == (
        f"error: router=base stands in {ours} and in {theirs}, and only the first would be read: give yours another "
        "name, as router/my_base.yaml"
    )
    assert not (tmp_path / "runs").exists()


def test_files_with_names_of_their_own_and_copies_of_ours_are_no_shadows(tmp_path: Path) -> None:
    ours = program.REPOSITORY / "conf"
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("num_experts: 4\n")
    (tmp_path / "router" / "base.yaml").write_bytes((ours / "router" / "base.yaml").read_bytes())
    plugins.refuse_shadowed(
        ["-cd", str(tmp_path), "-m", "router=mine,base", "+hydra.searchpath=[pkg://some.conf]"], ours
    )
    (tmp_path / "router" / "base.yaml").write_text("num_experts: 4\n")
    # Whose folder is the first is read first.
    plugins.refuse_shadowed([f"--config-path={tmp_path}", f"hydra.searchpath=[file://{ours}]"], ours)
    with pytest.raises(ConfigError, match="router=base stands in"):
        plugins.refuse_shadowed([f"hydra.searchpath=[pkg://some.conf,{tmp_path}]"], ours)
