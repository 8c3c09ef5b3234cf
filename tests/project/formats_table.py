"""Runs every kind of weights in every architecture (`tests/kernels/whole_models/test_formats.py`) and writes its table in README.

python -P tests/project/formats_table.py
"""

import re
import sys
from pathlib import Path

import pytest

from meshd.kernels.weights.load import KINDS
from meshd.models.architectures import ARCHITECTURES
from meshd.models.importing.huggingface import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- formats: written by `make formats` -->", "<!-- formats end -->"


class Results:
    """The outcome of each test, by its pair of architecture and kind of weights. A pytest plugin."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        match = re.search(r"is_exact\[(.+)-(\w+)\]$", report.nodeid)
        if match and (report.when == "call" or report.failed):
            self.of[match[1], match[2]] = report.outcome


def table(results: dict[tuple[str, str], str]) -> str:
    """Make the Markdown table: a row for each architecture, a column for each kind. A cell says `yes`, or what happened instead."""
    rows = [("architecture", "folders of `model_type`", *KINDS), ("---",) * (2 + len(KINDS))]
    for architecture in ARCHITECTURES:
        families = ", ".join(kind for kind, family in FAMILIES.items() if family.architecture == architecture)
        cells = (results.get((architecture, kind), "not run") for kind in KINDS)
        rows.append((architecture, families, *("yes" if cell == "passed" else cell for cell in cells)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(readme: str, made: str) -> str:
    """Return the text of README with `made` as its table."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}{END}{after}"


def main() -> int:
    results = Results()
    target = str(ROOT / "tests/kernels/whole_models/test_formats.py")
    status = pytest.main(["-q", "-m", "", "-k", "is_exact", "-p", "no:cacheprovider", target], [results])
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), table(results.of)))
    passed = sum(outcome == "passed" for outcome in results.of.values())
    print(f"README.md: {passed} of {len(KINDS) * len(ARCHITECTURES)} pairs passed")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
