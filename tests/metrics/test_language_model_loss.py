import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_base.metrics import LanguageModelLoss


def measured(*batches: tuple[list[float], list[int]]) -> dict[str, float]:
    metric = LanguageModelLoss()
    for nll, target_bytes in batches:
        metric.update(torch.tensor(nll), torch.tensor(target_bytes, dtype=torch.int64))
    return {name: value.item() for name, value in metric.compute().items()}


def test_loss_perplexity_and_bits_per_byte_by_hand() -> None:
    # 6 nats over 2 targets and 4 bytes.
    expected = {"loss": 3.0, "perplexity": math.e**3, "bits_per_byte": 6 / math.log(2) / 4}
    assert measured(([2.0, 4.0], [3, 1])) == pytest.approx(expected)


def test_guessing_bytes_evenly_costs_eight_bits_per_byte() -> None:
    expected = {"loss": math.log(256), "perplexity": 256.0, "bits_per_byte": 8.0}
    assert measured(([math.log(256)] * 10, [1] * 10)) == pytest.approx(expected)


def test_there_are_no_bits_per_byte_where_nobody_knows_the_bytes() -> None:
    assert measured(([2.0, 4.0], [0, 0])) == pytest.approx({"loss": 3.0, "perplexity": math.e**3})


def test_bits_per_byte_does_not_depend_on_the_tokenizer() -> None:
    # The same 12 bytes at the same total cost, as 3 tokens or as 6.
    coarse, fine = measured(([8.0] * 3, [4] * 3)), measured(([4.0] * 6, [2] * 6))
    assert coarse["bits_per_byte"] == pytest.approx(fine["bits_per_byte"])
    assert coarse["perplexity"] != pytest.approx(fine["perplexity"])


def test_batches_of_unequal_size_weigh_by_their_targets() -> None:
    # 1 + 1 + 1 + 5 over 4; a mean of the means would be 3.
    assert measured(([1.0, 1.0, 1.0], [1, 1, 1]), ([5.0], [1]))["loss"] == 2.0


@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=30), st.data())
def test_how_targets_are_cut_into_batches_does_not_matter(nll: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(nll)))
    ones = [1] * len(nll)
    assert measured((nll[:cut], ones[:cut]), (nll[cut:], ones[cut:])) == pytest.approx(measured((nll, ones)))
