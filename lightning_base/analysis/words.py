"""The findings in words: for the page and for the terminal."""

from collections.abc import Iterator

from lightning_base.analysis.measure import Findings, LayerFindings
from lightning_base.analysis.run import FinishedRun
from lightning_base.analysis.tables import percent


def lead(run: FinishedRun, findings: Findings) -> str:
    """What this is about, in one sentence."""
    layer = findings.layers[0]
    per_token = layer.choices.asked / layer.choices.num_tokens
    later = "" if run.causal else ", which for this router depends on later tokens (not causal)"
    return (
        f"{run.router} with {layer.choices.num_experts} experts, {per_token:.3g} per token, at step "
        f"{findings.newest:,}: {layer.choices.num_tokens:,} validation tokens, routed as in evaluation{later}."
    )


def sentences(findings: Findings) -> list[str]:
    """The main numbers, a sentence per layer."""
    return [f"{layer.name}: {'; '.join(said(layer))}." for layer in findings.layers]


def said(layer: LayerFindings) -> Iterator[str]:
    """What is said of one layer."""
    yield (
        f"{percent(layer.tokens.concentration)} of the text is at the favourite expert of its token (by chance "
        f"{percent(layer.tokens.by_chance)}), {percent(layer.preceding.concentration)} at that of the token before it "
        f"({percent(layer.preceding.by_chance)})"
    )
    if several_domains(layer):
        found = layer.domains
        yield f"{percent(found.concentration)} is at that of its domain ({percent(found.by_chance)})"
    if len(layer.moments) > 1:
        first, last = layer.moments[0], layer.moments[-1]
        yield f"{percent(first.saturation)} of the experts were already chosen at step {first.step:,}"
        yield f"{percent(last.switch_fraction)} of the tokens changed experts since step {last.previous_step:,}"


def missing(run: FinishedRun, findings: Findings) -> list[str]:
    """What could not be shown, and how to get it."""
    found = []
    if len(findings.steps) < 3:
        have = " and ".join(f"step {step:,}" for step in findings.steps)
        nothing = "they need two" if len(findings.steps) == 1 else "two make no curve"
        found.append(
            f"saturation and switching over training, because only the checkpoint{'s' * (len(findings.steps) > 1)} of "
            f"{have} {'are' if len(findings.steps) > 1 else 'is'} there, and {nothing}; train with "
            "trainer.keep_checkpoints=null and a small trainer.checkpoint_every_n_steps (it was "
            f"{run.config.trainer.checkpoint_every_n_steps}) to see them."
        )
    if not any(layer.has_pairs for layer in findings.layers):
        found.append("co-activation, because no token has more than one expert.")
    if not several_domains(findings.layers[0]):
        found.append(
            "specialization by domain, because all text routed here is of one domain; domains are the folders of .txt "
            "files, the files of .jsonl and .parquet, or what data.corpus.domain_column says."
        )
    return found


def several_domains(layer: LayerFindings) -> bool:
    """Whether the routed text is of more than one domain."""
    return int((layer.domains.totals > 0).sum()) > 1
