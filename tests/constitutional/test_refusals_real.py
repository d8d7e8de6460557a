"""The refusal counter on real answers that did not shape its rules, labelled by reading them before it was run on them.

They are the last turns of rows 287 to 498 of the hh-rlhf harmless pairs whose first 200 characters hold "can't",
"sorry", "not allowed" and the like, so that keywords alone would not do, less five that had been read while the rules
were written. `290c` is the chosen answer of row 290, counted from 0. An answer that says it cannot, will not or may not
do what was asked is a refusal, even if it then helps with a part; one that does not know or does not understand is
none. The rules before these were right on 52 of the 62, these on 58 when they were first run; 332c, an adverb before
"can't", is mended since.
"""

import json
from pathlib import Path

import pytest

from align_cli.constitutional.refusals import is_refusal

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "hh_harmless_pairs.jsonl"
REFUSED = "290c 296r 316c 327c 332c 334c 340c 346c 399c 402c 409c 433c 456c 465c 465r 474c 484c 491c 491r"
HELPED = (
    "292r 296c 297r 304r 305c 309r 314c 317r 318c 326r 329c 337c 341c 345c 345r 352r 353c 355c 381c 383r "
    "388c 394r 397c 411r 429c 430c 430r 438c 449r 450c 450r 464c 467c 468r 471r 473c 478r 480c 484r 488r "
    "490r 496c 496r"
)
MISSED = {"327c", "433c", "465c"}


@pytest.fixture(scope="module")
def answer():
    if not FILE.is_file():
        pytest.skip("the real data is not on this machine")
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    side = {"c": "chosen", "r": "rejected"}
    return lambda name: rows[int(name[:-1])][side[name[-1]]].rsplit("\n\nAssistant:", 1)[1].strip()


def test_59_of_62_are_read_right(answer):
    refused, helped = REFUSED.split(), HELPED.split()
    assert (len(refused), len(helped)) == (19, 43)
    assert {name for name in refused if not is_refusal(answer(name))} == MISSED
    assert [name for name in helped if is_refusal(answer(name))] == []
