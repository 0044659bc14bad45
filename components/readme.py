"""Write each component's README.md from its code: `python -m components.readme`. A test fails when one is out of date."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from components import STEPS

FOLDER = Path(__file__).parent


def render(step: str) -> str:
    """The README of one component: description, inputs, outputs."""
    spec = getattr(import_module(f"components.{step}.component"), step).component_spec
    lines = [f"# {step}", "", spec.description.strip(), "", "## Inputs", "", "| name | type | default | meaning |", "|---|---|---|---|"]
    for name, entry in (spec.inputs or {}).items():
        default = f"`{entry.default!r}`" if entry.optional else "required"
        lines.append(f"| `{name}` | {_type(entry.type)} | {default} | {_one_line(entry.description)} |")
    lines += ["", "## Outputs", ""]
    if spec.outputs:
        lines += ["| name | type | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {_type(entry.type)} | {_one_line(entry.description)} |" for name, entry in spec.outputs.items()]
    else:
        lines.append("None.")
    return "\n".join([*lines, "", "Generated from `component.py` by `python -m components.readme`.", ""])


def _type(name: str) -> str:
    return name.removeprefix("system.").partition("@")[0]


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    for step in STEPS:
        (FOLDER / step / "README.md").write_text(render(step), encoding="utf-8")


if __name__ == "__main__":
    main()
