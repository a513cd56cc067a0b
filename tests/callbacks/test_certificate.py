"""The fingerprint of a run's batches: the same however they are cut, and another as soon as anything is elsewhere.

On several ranks it is looked at in test_world_size_changes_nothing.py.
"""

from typing import Any

import pytest
from tiny_training import SEQUENCES, fit, language_model, micro_batches

from lightning_base.callbacks.certificate import BatchFingerprint
from lightning_base.data.datamodule import with_host_values

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
Batch = dict[str, Any]


def fingerprint(*steps: list[Batch]) -> str:
    """Of a real fit over the micro batches of two steps."""
    seen = BatchFingerprint()
    fit(
        language_model("uniform", max_steps=2),
        [with_host_values(part) for step in steps for part in step],
        seen,
        accumulation=len(steps[0]),
    )
    found, sequences = seen.combined()
    assert sequences == 2 * SEQUENCES
    return found


def with_rows_swapped(step: list[Batch]) -> list[Batch]:
    (whole,) = step
    return [{name: whole[name].flip(0) if name in ("input_ids", "targets") else whole[name] for name in whole}]


def with_one_other(step: list[Batch], name: str) -> list[Batch]:
    (whole,) = step
    rows = whole[name].clone()
    rows[3, 5] = (rows[3, 5] + 1) % 7
    return [{**whole, name: rows}]


def test_accumulation_changes_nothing() -> None:
    whole = fingerprint(micro_batches(0), micro_batches(1))
    assert fingerprint(*(micro_batches(step, accumulation=2) for step in (0, 1))) == whole
    assert fingerprint(*(micro_batches(step, accumulation=4) for step in (0, 1))) == whole


def test_another_order_of_steps_or_within_a_step_is_another_fingerprint() -> None:
    whole = fingerprint(micro_batches(0), micro_batches(1))
    assert fingerprint(micro_batches(1), micro_batches(0)) != whole
    assert fingerprint(micro_batches(0), with_rows_swapped(micro_batches(1))) != whole


@pytest.mark.parametrize("name", ["input_ids", "targets"])
def test_one_other_token_is_another_fingerprint(name: str) -> None:
    whole = fingerprint(micro_batches(0), micro_batches(1))
    assert fingerprint(micro_batches(0), with_one_other(micro_batches(1), name)) != whole
