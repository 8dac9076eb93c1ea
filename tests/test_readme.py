"""The Python examples of the documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/models.md")
EXAMPLES = [
    (document, code)
    for document in DOCUMENTS
    for code in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
]


@pytest.mark.parametrize(("document", "code"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(document: str, code: str) -> None:
    exec(compile(code, document, "exec"), {})


def test_examples_are_found() -> None:
    for document in DOCUMENTS:
        assert sum(name == document for name, _ in EXAMPLES) >= 3
