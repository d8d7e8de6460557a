"""What a user did wrong, said in one line each: place, finding, expectation, remedy.

Every command collects all problems it can find and raises once. `cli.py` prints them and exits 2; any other
exception is a bug and exits 1.
"""

from __future__ import annotations

from difflib import get_close_matches


class AlignError(Exception):
    """One or more problems of the user's making; `lines` holds one printable line each."""

    exit_code = 2

    def __init__(self, *lines: str):
        self.lines = tuple(lines)
        super().__init__("\n".join(lines))


class RecipeError(AlignError):
    """A recipe, an override or a combination of settings that cannot run."""


class DataError(AlignError):
    """A source that is missing, broken or of another format than the stage needs."""


class UpstreamError(AlignError):
    """A model or a run that a recipe names and that cannot serve there."""


class LaunchError(AlignError):
    """Ranks, hosts or devices that are not there."""


def raise_all(kind: type[AlignError], lines: list[str]) -> None:
    """Raise `kind` with every line, or return if there is none."""
    if lines:
        raise kind(*lines)


def did_you_mean(word: str, known: list[str]) -> str:
    """`. Did you mean 'beta'?` for the nearest known word, else the empty string."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else ""
