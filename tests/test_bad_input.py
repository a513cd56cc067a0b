"""Every mistake gets one sentence and exit code 2, and nothing is written."""

from pathlib import Path

import forks
import program
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_base.benchmark.bare import configuration
from lightning_base.instantiation import ConfigError
from lightning_base.program.explain import explain
from lightning_base.program.flags import check_flags

CONF = str(program.REPOSITORY / "lightning_base" / "conf")
CASES = {
    "an unknown router": (["router=swich"], "router=swich does not exist; did you mean switch?"),
    "an unknown experiment": (
        ["experiment=comapre"],
        "experiment=comapre does not exist; did you mean compare or paper?",
    ),
    "an unknown key": (
        ["trainer.max_stepz=5"],
        "trainer.max_stepz is not a key of the configuration; did you mean trainer.max_steps?",
    ),
    "an unknown key that is appended": (["+trainer.max_stepz=5"], "did you mean max_steps?"),
    "an argument of the Trainer without its plus": (
        ["trainer.limit_val_batches=2"],
        "trainer.limit_val_batches is an argument of Lightning's Trainer that is added with a plus: "
        "+trainer.limit_val_batches=...",
    ),
    "an argument of the Trainer that the comparison does not bear": (
        ["+trainer.overfit_batches=1"],
        "trainer.overfit_batches is not passed to Lightning's Trainer: Lightning would replace the loader that keeps "
        "the order of the batches: use debug=overfit",
    ),
    "an unknown option of a router": (["router=switch", "router.capacity=2"], "did you mean router.capacity_factor?"),
    "an option of some routers of a sweep": (
        ["-m", "router=switch,top_k", "router.capacity_factor=2"],
        "router.capacity_factor is not a key of the configuration while router is BASE; choose one of gate, "
        "num_experts, solver, top_k; in a sweep over router, write ++router.capacity_factor=...",
    ),
    "another type": (["trainer.max_steps=many"], "trainer.max_steps='many' should be a whole number"),
    "another type in a list": (["module.betas=[0.9,x]"], "module.betas=[0.9, 'x'] should be a list of a number"),
    "a value out of range": (["trainer.max_steps=0"], "trainer.max_steps=0 is out of range: give at least 1"),
    "an option that is none of its choices": (["module.schedule=cosin"], "should be cosine or linear or constant"),
    "a missing value": (["data=text"], "data.corpus.files is missing"),
    "more experts than tokens in a group": (
        ["router=switch", "router.num_experts=100000"],
        "router.num_experts=100000 exceeds the 1024 tokens of a routing group",
    ),
    "k above E": (["router=top_k", "router.top_k=9"], "router.top_k=9 with router.num_experts=8"),
    "a width that k does not divide": (["router=top_k", "router.top_k=3"], "cannot be split over router.top_k=3"),
    "an expert width that the matmul cannot take": (["model.ffn_width=100"], "model.ffn_width=100 makes experts"),
    "a solver that does not exist": (["router=base", "router.solver=magic"], "router.solver=magic: choose one of"),
    "a callback that does not exist": (
        ["callbacks.alarms._target_=lightning_base.callbacks.alarms.Alarm"],
        "callbacks.alarms._target_=lightning_base.callbacks.alarms.Alarm is not a Callback",
    ),
    "an option that a callback does not have": (["+callbacks.alarms.dead_check=3"], "did you mean dead_checks"),
    "no data": (["~data"], "data.corpus is missing"),
    "recording that is switched twice": (
        ["callbacks.plans.when=true"],
        "trainer.record_plans=false and callbacks.plans disagree",
    ),
    "a callback of nobody's": (["+callbacks.mine={a: 1}"], "callbacks.mine has no _target_"),
    "heads that do not divide the width": (["model.heads=5"], "model.heads=5 is out of range"),
    "a GPU that is not there": (
        ["trainer.accelerator=gpu", "strategy=ddp", "trainer.devices=64", "data.global_batch=512"],
        "but this machine has",
    ),
    "several devices without a strategy": (["trainer.devices=2"], "add strategy=ddp"),
    "a batch that the ranks do not divide": (
        ["strategy=ddp", "trainer.devices=3"],
        "data.global_batch=16 cannot be divided by trainer.devices",
    ),
    "experts that the ranks cannot share": (
        ["router=switch", "router.num_experts=6", "strategy=expert_parallel", "trainer.devices=4"],
        "router.num_experts=6 cannot be shared equally by the 4 ranks of an expert group: choose a multiple of 4, or a "
        "smaller strategy.expert_group",
    ),
    "an expert group that does not divide the ranks": (
        ["strategy=expert_parallel", "trainer.devices=4", "strategy.expert_group=3"],
        "strategy.expert_group=3 does not divide the 4 ranks",
    ),
    "a precision that skips steps, where ranks hold different parameters": (
        ["strategy=fsdp", "trainer.devices=2", "trainer.precision=16-mixed"],
        "trainer.precision=16-mixed with strategy=fsdp",
    ),
    "a shuffle over micro batches that are not there yet": (
        ["model.shuffle_tokens=true", "trainer.accumulate_grad_batches=2"],
        "shuffle among the sequences of one, model.shuffle_tokens=8, or among fewer",
    ),
    "nodes that do not know of each other": (
        ["strategy=ddp", "trainer.num_nodes=2", "trainer.accelerator=cpu"],
        "needs the environment variables NODE_RANK",
    ),
    "a target outside the allow-list": (
        ["router._target_=torch.hub.load"],
        "router._target_=torch.hub.load is not allowed",
    ),
    "a corpus target outside the allow-list": (["data.corpus._target_=joblib.load"], "is not allowed"),
    "a target that is no router": (["router._target_=lightning_base.model.Transformer"], "is not a Router"),
    "one bad arm of a sweep": (
        ["-m", "router=uniform,switch", "router.num_experts=8,100000"],
        "exceeds the 1024 tokens",
    ),
    "one unknown router of a sweep": (["-m", "router=uniform,swich"], "did you mean switch?"),
    "an override that cannot be read": (["nonsense"], "nonsense has no value: write nonsense=..."),
    "no router": (["router=null"], "router=null names no choice: leave it out"),
    "no callbacks": (["callbacks=3"], "callbacks=3 names no choice: leave it out, or write ~callbacks"),
    "an arm more than a run has": (
        ["router=base,switch"],
        "router=base,switch is several values: write -m in front to train each",
    ),
    "a list without its brackets": (
        ["data.corpus.files=a.txt,b.txt"],
        "write -m in front to train each, or data.corpus.files=[a.txt,b.txt] for a list",
    ),
    "a number among groups of options": (["callbacks.alarms=3"], "callbacks.alarms=3 should be a group of options"),
    "a number for files": (["data=text", "data.corpus.files=3"], "data.corpus.files=3 should be a text or a list of"),
    "a flag of somebody else's": (["--max_steps", "4"], "--max_steps is no flag: write trainer.max_steps=4"),
    "a pickle": (["--experimental-rerun", "nope"], "--experimental-rerun reads a pickle, which is code"),
    "a wrong value in a model of transformers": (
        ["model=huggingface", "model.config.hidden_size=x"],
        "model.config.hidden_size='x' should be a whole number",
    ),
    "no configuration of a model": (
        ["model=huggingface", "model.config=7"],
        "model.config=7 should be a text or a group of options",
    ),
    "a vocabulary that is not given": (
        ["data=tokens", "data.corpus.files=x.npy", "data.end_of_text=3"],
        "data.vocab_size=null has to be given: a whole number",
    ),
    "the name of a token that nobody can look up": (
        ["data=tokens", "data.corpus.files=x.npy", "data.vocab_size=9", "data.end_of_text='<s>'"],
        "data.end_of_text=<s>, which only data.tokenizer could tell the id of: give the id",
    ),
    "a folder of files": (
        ["data=text", "data.corpus.files=tests/huggingface"],
        "data.corpus.files=tests/huggingface is a folder: give its files, as tests/huggingface/",
    ),
    "a resume from nothing": (["resume=/nowhere"], "resume=/nowhere: the checkpoint /nowhere does not exist"),
    "a name that leaves the runs": (["name=../runs"], "name='../runs' is out of range"),
    "a sweep with a name that leaves the runs": (["-m", "router=base,switch", "name=.."], "name='..' is out of range"),
    "a text glob that matches nothing": (["data=text", "data.corpus.files=/nowhere/*.txt"], "matches no file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(case: str, tmp_path: Path) -> None:
    arguments, sentence = CASES[case]
    model = [] if "model=huggingface" in arguments else ["model=small"]
    # One of them as a user starts it, where the imports too may write a line.
    start = program.train_anew if case == "an unknown router" else program.train
    done = start(*arguments, "debug=fast", *model, f"runs_dir={tmp_path}/runs", timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert sentence in lines[0]
    assert not list(tmp_path.iterdir())


MEANT = {
    "trainr.max_steps=3": "trainr.max_steps is not a key of the configuration; did you mean trainer.max_steps?",
    "max_steps=3": "max_steps is not a key of the configuration; did you mean trainer.max_steps?",
    "data.batch_size=4": "data.batch_size is not a key of the configuration; did you mean data.global_batch?",
    "steps=3": "steps is not a key of the configuration; did you mean callbacks.profile.steps or trainer.max_steps?",
    "lr=3": "lr is not a key of the configuration; did you mean module.learning_rate?",
    "~callbacks.alarm": "callbacks.alarm is not a key of the configuration; did you mean callbacks.alarms?",
    "callbacks.alarm.dead_checks=3": "callbacks.alarm.dead_checks is not a key of the configuration; did you mean "
    "callbacks.alarms.dead_checks?",
    "router.capacity_factor=2": "router.capacity_factor is not a key of the configuration while router is BASE; choose "
    "one of gate, num_experts, solver, top_k",
    "trainer.profile_steps=3": "trainer.profile_steps is not in the configuration yet: add it with a plus, "
    "+trainer.profile_steps=3",
    "callbacks.alarms.dead_checks=3": "callbacks.alarms.dead_checks is not in the configuration yet: add it with a "
    "plus, +callbacks.alarms.dead_checks=3",
    "module.loss_coefficients.z_loss=1": "module.loss_coefficients is empty: add to it with a plus, "
    "+module.loss_coefficients.z_loss=1",
    "+trainer.max_steps=3": "trainer.max_steps is in the configuration already: leave out the plus",
    "router=BASE": "router=BASE does not exist; did you mean base or hash?",
    "router==switch": "router==switch has an equals sign too many: write router=switch",
    "data.corpus.files=~/x.txt": "data.corpus.files=~/x.txt cannot be read: quote the value, "
    f"'data.corpus.files=\"{Path.home()}/x.txt\"'",
    "router={num_expert: 4}": "router.num_expert is not a key of the configuration while router is BASE; did you mean "
    "router.num_experts?",
    "module.betas=[1": "module.betas=[1 cannot be read: close its brackets and quotes",
}


def raise_what_nobody_foresaw(key: str) -> None:
    from lightning_base.program.sweep import leaving

    with pytest.raises(SystemExit) as left, leaving():
        raise KeyError(key)
    assert left.value.code == 1


def test_what_no_check_foresaw_ends_the_command_before_the_first_job() -> None:
    # Hydra warns of an exception in a callback and goes on; an exit ends it.
    forks.call(raise_what_nobody_foresaw, "x")


def test_runs_do_not_go_into_a_folder_called_tilde() -> None:
    with pytest.raises(ConfigError, match=r"^runs_dir=~/runs is out of range: write out what ~ stands for$"):
        configuration(["runs_dir='~/runs'"])


@pytest.mark.parametrize("override", MEANT)
def test_what_cannot_be_composed_names_what_was_meant(override: str) -> None:
    with pytest.raises(HydraException) as caught, initialize_config_dir(CONF, version_base="1.3"):
        compose("config", [override])
    assert explain(caught.value) == MEANT[override]


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [1\nb: }\n")
    done = program.train(f"--config-dir={tmp_path}", "experiment=mine", f"runs_dir={tmp_path}/runs")
    assert done.stderr.startswith(f"error: {tmp_path}/experiment/mine.yaml is no YAML: expected ',' or ']'")
    assert (done.returncode, done.stderr.count("\n"), done.stderr.strip()[-9:]) == (2, 1, "in line 2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr=4"], "--lr is no flag: write module.learning_rate=4"),
        (["--what"], "--what is no flag: options are written as trainer.max_steps=4, and --help shows them"),
        (["router=base,switch", "-m", "seed=1"], "seed=1 comes too late: write flags such as -m before all that is "),
        (["--cfg", "jub"], "the command line cannot be read: argument --cfg/-c: invalid choice: 'jub'"),
    ],
)
def test_a_flag_that_there_is_not_names_the_key(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_flags(arguments)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"", "is empty"), (bytes(range(256)) * 20, "binary")], ids=["empty", "binary"]
)
def test_a_file_that_holds_no_text_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    done = program.train(
        "debug=fast", "data=text", f"data.corpus.files={tmp_path}/bad.txt", f"runs_dir={tmp_path}/runs"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.corpus.files")
    assert sentence in done.stderr


def test_a_loss_that_is_not_finite_names_step_and_layer(small_corpus: list[str], tmp_path: Path) -> None:
    broken = ["module.learning_rate=1e30", "module.final_learning_rate=0", "trainer.checkpoint_every_n_steps=1"]
    done = program.train(*small_corpus, *broken, "trainer.gradient_clip_val=null", f"runs_dir={tmp_path}")
    job = program.only_job(tmp_path)
    status = program.read(job / "status.json")
    assert done.returncode == 1
    assert status["state"] == "failed"
    assert "The loss is not finite at step 2, first in " in status["error"]
    assert status["error"] in done.stderr
    (alarm,) = status["alarms"]
    assert (alarm["name"], alarm["step"]) == ("non_finite_gates", 2)
    assert "ALARM=non_finite_gates" in done.stdout + done.stderr
    events = EventAccumulator(str(job / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("alarm/non_finite_gates")] == [(2, 1.0)]
    (event,) = events.Tensors("alarms/text_summary")
    assert alarm["sentence"].encode() in event.tensor_proto.string_val[0]
    # The weights after step 1 are finite and useless: nothing to go on from is left behind.
    assert "no checkpoint was saved yet" in status["error"]
    assert list((job / "checkpoints").glob("step_*.ckpt")) == []


def test_the_checkpoint_that_is_called_good_is_the_newest_and_gave_a_finite_loss(
    small_corpus: list[str], tmp_path: Path
) -> None:
    # Adam moves every weight by about the learning rate, k x 1e7 in step k: some steps go well.
    growing = ["module.learning_rate=2e8", "module.warmup_steps=20", "trainer.max_steps=20", "router=switch"]
    growing += ["module.final_learning_rate=0", "trainer.checkpoint_every_n_steps=1", "trainer.gradient_clip_val=null"]
    done = program.train(*small_corpus, *growing, f"runs_dir={tmp_path}")
    assert done.returncode == 1
    job = program.only_job(tmp_path)
    error = program.read(job / "status.json")["error"]
    step = int(error.partition("not finite at step ")[2].partition(",")[0])
    good = int(error.partition("checkpoints/step_")[2].partition(".ckpt")[0])
    assert 0 < good < step
    left = [int(path.stem.removeprefix("step_")) for path in (job / "checkpoints").glob("step_*.ckpt")]
    assert max(left) == good
