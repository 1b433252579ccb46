"""docs/security.md names the test that shows each line: they must exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_page_on_security_names_exists():
    page = (TESTS.parent / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named
               if not (TESTS / file).is_file() or f"def {name}(" not in (TESTS / file).read_text(encoding="utf-8")]  # fmt: skip
    assert not missing
    rows = [line for line in page.split("\n") if line.startswith("| ") and "|---" not in line]
    assert all("::test_" in row for row in rows if not row.endswith("| Test |")), "each line has its test"
