"""How many examples a property gets: few, and the same each time, in CI; many new ones in the nightly run."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

ASKED = os.environ.get("DEJAVU_EXAMPLES", "")
"""Examples of every property, whatever it asks for itself; empty: as many as it asks for."""

Test = TypeVar("Test", bound=Callable[..., Any])


def examples(count: int) -> Callable[[Test], Test]:
    """Mark a test as a property and give it so many examples; on top of `given`.

    Args:
        count: examples, drawn from a fixed seed. With DEJAVU_EXAMPLES there are as many as that says, others each time,
            and a failure prints what repeats it.
    """
    asked = int(ASKED) if ASKED else count
    # How fast a machine draws is no property of the code.
    how = settings(
        max_examples=asked,
        derandomize=not ASKED,
        print_blob=bool(ASKED),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )

    def marked(test: Test) -> Test:
        found: Test = pytest.mark.property(how(test))
        return found

    return marked
