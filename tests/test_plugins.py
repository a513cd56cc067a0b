"""Routers of another package: named on the command line, written into the certificate, refused where not declared."""

import json
import sys
from pathlib import Path
from typing import Any

import forks
import program
import pytest
from their_package import install

import lightning_base
from lightning_base.instantiation import ConfigError
from lightning_base.program import plugins
from lightning_base.program.sources import source_hash

CONF = program.REPOSITORY / "lightning_base" / "conf"


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
    recorded = {target.partition(".")[0]: manifest["sources"] for target, manifest in by_router.items()}
    installed, theirs = (recorded[package]["router"][package] for package in ("installed_package", "their_package"))
    assert (installed["version"], theirs["version"]) == ("1.2", "none")
    # The two packages have the same source, and no compiled file or folder name is in the hash.
    assert installed["source_sha256"] == theirs["source_sha256"]
    assert recorded["installed_package"]["callbacks.mine"] == {"their_package": theirs}
    own = {"version": lightning_base.__version__, "source_sha256": source_hash("lightning_base")}
    assert recorded["installed_package"]["program"] == {"lightning_base": own}
    # What is done stays theirs until their source is another.
    with open(tmp_path / "site" / "installed_package" / "__init__.py", "a") as file:
        file.write("# more\n")
    again = forks.run(program.command(*arguments), environment=with_packages)
    assert again.returncode == 2
    assert "error: router._target_ is of installed_package, which has changed since the run in " in again.stderr
    assert f"(version 1.2, source {installed['source_sha256'][:12]} then, version 1.2, source " in again.stderr


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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path, "declared_package")
    (tmp_path / "broken_package.py").write_text("1 / 0\n")
    (tmp_path / "leaving_package.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "declared_package" / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("declared_package", "installed_package", "shadowing_package", "twice_package"):
        sys.modules.pop(name, None)


def compose(site: str, *arguments: str) -> None:
    """Prints the routers of a sweep's jobs, as far as the program reads them before it looks at anything else."""
    # In a fork, which has all of the program.
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from lightning_base.program.job import plain_config
    from lightning_base.program.sweep import expand

    sys.path.insert(0, site)
    GlobalHydra.instance().clear()
    try:
        plugins.offer_routers(arguments, CONF / "router")
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
            opened = GlobalHydra.instance().hydra
            config = opened.compose_config("config", list(arguments), run_mode=RunMode.MULTIRUN)
            jobs = [opened.config_loader.load_sweep_config(config, list(job)) for job in expand(config)]
            print(json.dumps([plain_config(job)["router"] for job in jobs]))
    except ConfigError as error:
        print(json.dumps(str(error)))


def composed(site: Path, *arguments: str) -> Any:
    """What ``compose`` prints: the routers, or the sentence that says what is wrong."""
    out, errors = forks.start_function(compose, str(site), *arguments).communicate(60)
    assert not errors
    return json.loads(out)


MISTAKES = {
    "not declared": (
        ["router=declared_package.MyRouter"],
        "router._target_=declared_package.MyRouter is not allowed, since its package is not declared: add "
        "plugins=[declared_package], or name a router of lightning_base",
    ),
    "another package is": (["plugins=[declared_package]", "router=base,json.JSONDecoder"], "add plugins=[json]"),
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
    "no such class": (["plugins=[declared_package]", "router=declared_package.MyRoute"], "does not exist"),
    "a router of ours by its class": (
        ["router=lightning_base.routing.switch.Switch"],
        "router=lightning_base.routing.switch.Switch is of lightning_base, whose routers have short names: "
        "router=switch",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_router_that_cannot_be_used_is_refused(case: str, site: Path) -> None:
    arguments, sentence = MISTAKES[case]
    found = composed(site, *arguments)
    assert sentence in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "written",
    [
        ["plugins=[declared_package]", "router=switch,declared_package.MyRouter"],
        ["plugins=[declared_package, json]", "router=switch, declared_package.MyRouter"],
        ["plugins=['declared_package']", "router=choice(switch,declared_package.MyRouter)"],
        ["++plugins=[declared_package]", "router=switch,'declared_package.MyRouter'"],
    ],
    ids=lambda written: written[1],
)
def test_a_plugin_may_be_written_in_every_way_that_hydra_reads(written: list[str], site: Path) -> None:
    ours, theirs = composed(site, *written)
    assert ours["_target_"] == "lightning_base.routing.switch.Switch"
    assert theirs == {"_target_": "declared_package.MyRouter", "num_experts": 8, "offset": 1}
    assert composed(site, *written, "++router.offset=3")[1]["offset"] == 3


FILES = {
    "a router": "defaults: [{override /router: declared_package.MyRouter}]\nplugins: [declared_package]",
    "a sweep": "hydra: {sweeper: {params: {router: declared_package.MyRouter}}}\nplugins: [declared_package]",
    "an entry point": "defaults: [{override /router: theirs}]",
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_may_declare_a_plugin_and_name_its_router(case: str, site: Path) -> None:
    (site / "experiment").mkdir()
    (site / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{FILES[case]}\n")
    if case == "an entry point":
        install(site, "installed_package", "theirs")
    # Without a plus: options are known, or are looked at when the class is.
    arguments = ["experiment=mine", f"hydra.searchpath=[file://{site}]"]
    (router,) = composed(site, *arguments, *(["router.offset=3"] if case != "a sweep" else ["++router.offset=3"]))
    assert router.pop("_target_").endswith("_package.MyRouter")
    assert router == {"num_experts": 8, "offset": 3}


def test_a_router_may_be_a_class_within_a_class(site: Path) -> None:
    plugins.declare(["declared_package"])
    assert plugins.node_of("declared_package.Outer.Inner")["offset"] == 1
    with pytest.raises(ConfigError, match="has no attribute 'Iner'; did you mean Inner"):
        plugins.node_of("declared_package.Outer.Iner")


def test_an_installed_router_may_not_have_the_name_of_ours_or_of_another(site: Path) -> None:
    install(site, "shadowing_package", "base")
    with pytest.raises(ConfigError, match="has the name of a router of lightning_base"):
        plugins.offer_routers([], CONF / "router")
    install(site, "twice_package", "base")
    with pytest.raises(ConfigError, match="two installed packages name a router base"):
        plugins.offer_routers([], CONF / "router")


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
        ({"one_package": "mine"}, ["router=min"], "router=min does not exist; did you mean mine?"),
    ],
    ids=["does not import", "no router", "a name of ours", "one name twice", "nearly an installed one"],
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
