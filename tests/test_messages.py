"""What ranks tell each other."""

import pytest
import ranks

DECIDES = """
from pathlib import Path
from align_cli import distributed
from align_cli.errors import UpstreamError

def refuse():
    raise UpstreamError("one line", "and another")

distributed.join()
found = distributed.from_rank_0(lambda: [file.name for file in Path().iterdir()])
try:
    distributed.from_rank_0(refuse)
except UpstreamError as error:
    print(found, error.lines)
distributed.leave()
"""


def test_rank_0_decides_what_its_files_say(tmp_path):
    for folder, file in (("one", "mine"), ("two", "theirs")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    said = ranks.said(DECIDES, tmp_path / "one", tmp_path / "two")
    assert said == ["['mine'] ('one line', 'and another')"] * 2


WAITS = """
import os, time
from datetime import timedelta
from align_cli import distributed

distributed.COLLECTIVE = timedelta(seconds=20)
distributed.join()
rank = distributed.rank()
said = []
for wait in (
    distributed.barrier,
    lambda: distributed.broadcast(7),
    lambda: distributed.gather(rank),
    lambda: distributed.largest(rank),
    lambda: distributed.from_rank_0(lambda: time.sleep(25)),
):
    # each of them is entered late by one rank
    time.sleep(25 * rank)
    said.append(wait())
distributed.leave()
print(said)
"""


@pytest.mark.slow
def test_ranks_wait_for_each_other_longer_than_collectives_may_take(tmp_path):
    assert ranks.said(WAITS, tmp_path, tmp_path) == ["[None, 7, [0, 1], 1, None]"] * 2
