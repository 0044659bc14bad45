"""The one exception that means "the user can fix this": a field, what is wrong with it, and the fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input. Shown as one line, `error: FIELD: PROBLEM; FIX`, and ends the process with code 2."""

    def __init__(self, field: str, problem: str, fix: str):
        self.field, self.problem, self.fix = field, problem, fix
        super().__init__(" ".join(f"{field}: {problem}; {fix}".split()))


class TrainingDiverged(RuntimeError):
    """The loss or a gradient became NaN or infinite; the last good state was saved before this was raised."""
