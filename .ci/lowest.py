"""Constraints for pip: every requirement of pyproject.toml at the lowest version it allows, or a patch of that.

python .ci/lowest.py > constraints.txt
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = ("cpu", "dev")
"""Those that the tests are run with."""


def lowest() -> Iterator[str]:
    """One line a requirement that has a lower bound and applies here."""
    told = [*PROJECT["dependencies"], *(item for extra in EXTRAS for item in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, told):
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if bounds and (requirement.marker is None or requirement.marker.evaluate()):
            yield f"{re.sub('[-_.]+', '-', requirement.name).lower()}=={bounds[0]}.*"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sorted(set(lowest())))
