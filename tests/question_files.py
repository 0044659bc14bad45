"""Shared by the tests of the data steps: rows written as JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, questions: list[str], **columns: Any) -> dict[str, Any]:
    """Write `questions`, answered by their index, and return the source that names the file."""
    lines = [{"question": question, "answer": index, **columns} for index, question in enumerate(questions)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"kind": "jsonl", "name": str(path)}
