"""Says what an audit of dependencies could not see, for a package that was not looked up is not a safe one.

python .ci/audited.py dist/audit.json
"""

import json
import sys
from pathlib import Path


def told(audit: dict[str, list[dict[str, object]]]) -> str:
    """One line: how many packages were looked up, and which were not.

    >>> told({"dependencies": [{"name": "a", "vulns": []}, {"name": "b", "skip_reason": "not found"}]})
    '1 of 2 packages audited, none with a known fault; not audited: b'
    """
    packages = audit["dependencies"]
    left_out = [str(one["name"]) for one in packages if "skip_reason" in one]
    faulty = [str(one["name"]) for one in packages if one.get("vulns")]
    line = f"{len(packages) - len(left_out)} of {len(packages)} packages audited"
    line += f", with known faults: {', '.join(faulty)}" if faulty else ", none with a known fault"
    return line + (f"; not audited: {', '.join(left_out)}" if left_out else "")


if __name__ == "__main__":
    sys.stdout.write(f"{told(json.loads(Path(sys.argv[1]).read_text()))}\n")
