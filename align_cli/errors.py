"""Exceptions for user errors. Each problem is one line: place, finding, expectation, remedy.

Every command collects all problems it can find and raises once. `cli.py` prints them and exits 2; any other
exception is a bug and exits 1.
"""

from __future__ import annotations

from difflib import get_close_matches


class AlignError(Exception):
    """One or more user errors; `lines` holds one printable line per error."""

    exit_code = 2

    def __init__(self, *lines: str):
        self.lines = tuple(lines)
        super().__init__("\n".join(lines))

    def __reduce__(self):
        # ranks send errors to each other; an exception would be made again from its message alone
        return _again, (type(self), self.lines, vars(self))


def _again(kind: type[AlignError], lines: tuple[str, ...], state: dict[str, object]) -> AlignError:
    error = kind.__new__(kind)
    AlignError.__init__(error, *lines)
    vars(error).update(state)
    return error


class RecipeError(AlignError):
    """A recipe, an override or a combination of settings that cannot run."""


class DataError(AlignError):
    """A source is missing, broken or in a format that the stage cannot use."""


class UpstreamError(AlignError):
    """A model, run or reward function that the recipe or the command names cannot be used there."""


class TrainingError(AlignError):
    """Training cannot go on: a loss, a weight or a score has become NaN or infinite, or there is nothing to train."""


class LaunchError(AlignError):
    """The launch failed: ranks, hosts or devices do not exist, or another process uses the run's directory."""


class Interrupted(AlignError):
    """A signal came while the run waited for somebody else, and nothing is left to finish."""

    def __init__(self, number: int, *lines: str):
        super().__init__(*lines)
        self.exit_code = 128 + number


class EndpointError(AlignError):
    """A server did not answer as it should; `code` is its HTTP status, or 0."""

    def __init__(self, line: str, code: int = 0):
        super().__init__(line)
        self.code = code


def raise_all(kind: type[AlignError], lines: list[str]) -> None:
    """Raise `kind` with all lines, unless `lines` is empty."""
    if lines:
        raise kind(*lines)


def did_you_mean(word: str, known: list[str]) -> str:
    """`. Did you mean 'beta'?` for the nearest known word, else the empty string."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else ""
