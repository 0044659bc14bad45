"""A name -> class table that refuses duplicates and, on a miss, lists what it knows."""

from __future__ import annotations

import importlib
from typing import Any

from dfpo_core.errors import UserError


class Registry:
    """Entries live one to a file in `package`; a file is imported only when its name is asked for.

    `names` maps each registered name to the module that defines it, so that a light client can check a name without
    importing torch.
    """

    def __init__(self, kind: str, package: str, names: dict[str, str]):
        self.kind, self.package, self.names = kind, package, dict(names)
        self.entries: dict[str, Any] = {}

    def register(self, name: str):
        """Decorator that files an entry under `name`; raises ValueError on a duplicate."""

        def add(entry):
            if name in self.entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self.entries[name] = entry
            entry.name = name
            return entry

        return add

    def get(self, name: str) -> Any:
        """The entry called `name`; raises UserError that lists the known names."""
        if name not in self.entries and name in self.names:
            importlib.import_module(f"{self.package}.{self.names[name]}")
        if name not in self.entries:
            known = ", ".join(sorted({*self.names, *self.entries}))
            raise UserError(self.kind, f"unknown name {name!r}", f"choose one of: {known}")
        return self.entries[name]
