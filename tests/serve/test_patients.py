"""Which ids are taken, before any of them becomes the name of a folder."""

from __future__ import annotations

import pytest

from resonance.serve.faults import ServiceError
from resonance.serve.patients import check_patient_id


@pytest.mark.parametrize("good", ["anna", "A-1_b.c", "0", "-", "_x", "a" * 64, "console", "com", "x..y", "lpt10"])
def test_letters_digits_and_a_few_signs_make_an_id(good: str) -> None:
    assert check_patient_id(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        *("", ".", "..", "../x", "..\\x", "a/b", "/etc/passwd", ".hidden", "a.", "a b", "a\n", "a\x00b", "%2e%2e", "~"),
        *("C:", "con", "NUL", "aux.txt", "Com1", "lpt9.tar.gz", "小明", "é", "😀", "a" * 65, "../" * 3_500, None, 7),
    ],
)
def test_anything_else_is_refused_without_repeating_it(bad: str) -> None:
    with pytest.raises(ServiceError) as error:
        check_patient_id(bad)
    problem = error.value
    assert (problem.status, problem.code, problem.param) == (400, "invalid_patient_id", "patient_id")
    assert len(str(problem.body)) < 500 and (not bad or len(str(bad)) < 3 or str(bad) not in problem.message)
