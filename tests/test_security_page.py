"""docs/security.md names the test that shows each line: they must exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def _exists(file: str, name: str) -> bool:
    path = TESTS / file
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


def test_every_test_that_the_page_on_security_names_exists():
    page = (TESTS.parent / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    assert not [f"{file}::{name}" for file, name in named if not _exists(file, name)]
    rows = [line for line in page.split("\n") if line.startswith("| ") and not line.endswith("| Test |")]
    assert all("::test_" in row for row in rows), "each line has its test"
