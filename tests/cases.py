"""Tests of many cases: a few of them run in `make test`, the others in `make test-services`."""

from collections.abc import Iterable
from typing import Any

import pytest


def few_of(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """For ``parametrize``: those that are not quick are left to the services.

    A tuple is the values of several arguments, and never that of a single one.
    """
    cases = list(cases)
    assert all(case in cases for case in quick), "a case that there is not"
    return [
        case
        if case in quick
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.services
        )
        for case in cases
    ]


IF_CALLS_FAIL = few_of(
    ["not asked", "answer lost", "answer of every third lost"], "answer of every third lost"
)
