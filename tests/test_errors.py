"""Errors travel between ranks whole."""

import pickle

import pytest

from align_cli.errors import AlignError, DataError, EndpointError, Interrupted


@pytest.mark.parametrize(
    "error", [AlignError("one", "two"), DataError("a"), EndpointError("no", 404), Interrupted(15, "stopped", "again")]
)
def test_an_error_is_the_same_on_another_rank(error):
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error) and other.lines == error.lines and vars(other) == vars(error)
    assert other.exit_code == error.exit_code and str(other) == str(error)
