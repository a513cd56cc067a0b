"""Whether later tokens matter where the router declares that they do not, and the other way round."""

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import TRAINING, Subject, decisions, groups_of, route, told
from lightning_base.routing.router import Router

TEXTS, SIZE, CUT = 6, 48, 30


@check
def causality(subject: Subject) -> None:
    """Changing later tokens changes no earlier decision where the router says so, and some where it does not."""
    for way, router in subject.ways():
        declared = router.causal if way == TRAINING else router.evaluation_modes[way]
        where = "causal" if way == TRAINING else f"evaluation_modes[{way!r}]"
        found = [change for text in range(TEXTS) if (change := heard(subject, router, text)) is not None]
        if declared and found:
            raise Broken(
                f"in {way} it declares {where} = True, and when only later tokens of the group changed, {found[0]}: "
                f"decide by what stands before a token, or declare {where} = False"
            )
        if not declared and not found:
            raise Broken(
                f"in {way} it declares {where} = False, and in {TEXTS} texts no earlier token heard of later ones: "
                f"declare {where} = True, or tables would mark its losses as looking ahead"
            )


def heard(subject: Subject, router: Router, text: int) -> str | None:
    """What becomes of an earlier token when only later ones change; None if all stay as they were."""
    size, cut = SIZE * subject.scale, CUT * subject.scale
    tokens, ids = subject.tokens(size, text)
    other_tokens, other_ids = subject.tokens(size, text + 1_000)
    if text % 2:
        # All alike: experts overflow, which is when drops could look ahead.
        other_tokens[cut:] = other_tokens[cut]
    other_tokens[:cut], other_ids[:cut] = tokens[:cut], ids[:cut]
    before = decisions(route(router, tokens, ids, groups_of(size)))
    after = decisions(route(router, other_tokens, other_ids, groups_of(size)))
    changed = [t for t in range(cut) if before[t] != after[t]]
    if not changed:
        return None
    one = changed[0]
    return f"{len(changed)} of {cut} earlier ones did too, token {one} from {told(before[one])} to {told(after[one])}"
