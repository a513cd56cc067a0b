"""The list of faults follows the code: what each of them changes is there, once."""

import pytest
from faults import FAULTS, Fault
from forks import REPOSITORY


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_place_of_a_fault_is_there_once(fault: Fault) -> None:
    assert (REPOSITORY / "lightning_base" / fault.file).read_text().count(fault.old) == 1
    tests = [word.partition("::")[0] for word in fault.tests.split() if ".py" in word]
    assert tests
    assert all((REPOSITORY / "tests" / name).is_file() for name in tests)
