from pathlib import Path

import forks
import pytest

PROGRAM = Path(__file__).with_name("under_a_limit.py")


# MB of the corpus and MB that preparing and reading it may take. Text takes more than ids, whatever its size: what is
# encoded at a time, and the words that the tokenizer learns from.
@pytest.mark.parametrize(
    ("kind", "corpus", "allowed"), [("ids", 64, 20), pytest.param("text", 64, 56, marks=pytest.mark.exhaustive)]
)
def test_a_corpus_that_does_not_fit_into_memory_is_prepared_and_read(
    kind: str, corpus: int, allowed: int, tmp_path: Path
) -> None:
    done = forks.run([PROGRAM, kind, str(corpus), str(allowed), tmp_path], timeout=500)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "the corpus does not fit"
    _, _, prepared, _, read = second.split()
    # 8 sequences of 4096 tokens at a time: all but what does not fill a batch.
    assert int(prepared) - 8 * 4096 < int(read) <= int(prepared)
    assert int(read) > 0.8 * (corpus / 2 if kind == "ids" else corpus / 6) * 2**20
