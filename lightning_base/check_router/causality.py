"""Whether later tokens matter where the router declares that they do not, and the other way round."""

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import TRAINING, Subject, decisions, differ, groups_of, route, told
from lightning_base.routing.router import Router

SIZE, CUT, EARLY_CUT = 48, 30, 8
# What looks ahead where experts overflow alone is looked for in more texts.
TEXTS, MOST_TEXTS = 6, 24


@check
def causality(subject: Subject) -> None:
    """Changing later tokens changes no earlier decision where the router says so, and some where it does not."""
    for way, router in subject.ways():
        declared = router.causal if way == TRAINING else router.evaluation_modes[way]
        where = "causal" if way == TRAINING else f"evaluation_modes[{way!r}]"
        changes = (heard(subject, router, text) for text in range(TEXTS if declared else MOST_TEXTS))
        found = next((change for change in changes if change is not None), None)
        if declared and found:
            raise Broken(
                f"in {way} it declares {where} = True, and when only later tokens of the group changed, {found}: "
                f"decide by what stands before a token, or declare {where} = False"
            )
        # Where every token asks for every expert there is nothing to look ahead for, whatever else is declared.
        if not declared and not found and router.top_k < router.num_experts:
            raise Broken(
                f"in {way} it declares {where} = False, and in {MOST_TEXTS} texts no earlier token heard of later "
                f"ones: declare {where} = True, or tables would mark its losses as looking ahead"
            )


def heard(subject: Subject, router: Router, text: int) -> str | None:
    """What becomes of an earlier token when only later ones change; None if all stay as they were."""
    # The fewer come before, the more of those that are alike overflow.
    size, cut = SIZE * subject.scale, (EARLY_CUT if text % 4 == 3 else CUT) * subject.scale
    tokens, ids = subject.tokens(size, text)
    other_tokens, other_ids = subject.tokens(size, text + 1_000)
    if text % 2:
        # All alike: experts overflow, which is when drops may look ahead.
        other_tokens[cut:] = other_tokens[cut]
    other_tokens[:cut], other_ids[:cut] = tokens[:cut], ids[:cut]
    before = decisions(route(router, tokens, ids, groups_of(size)))
    after = decisions(route(router, other_tokens, other_ids, groups_of(size)))
    changed = [t for t in range(cut) if differ(before[t], after[t])]
    if not changed:
        return None
    one = changed[0]
    return f"{len(changed)} of {cut} earlier ones did too, token {one} from {told(before[one])} to {told(after[one])}"
