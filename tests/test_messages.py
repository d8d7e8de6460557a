"""What ranks tell each other."""

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
