"""An ensemble of reward models: heads on one trunk, each of which learns from a bootstrap of the groups."""

from __future__ import annotations

import math
import random

from align_cli.training.layout import Row


def drawn(row: Row, seeds: list[int]) -> list[int]:
    """How often each head learns from a group: Poisson(1), the bootstrap of a stream (Oza 2005), by content, so that
    ranks and resumed runs agree."""
    counts = []
    for seed in seeds:
        draw, count, product = random.Random(f"{seed} {row['prompt_ids']} {row['responses']}"), 0, 1.0
        while (product := product * draw.random()) > math.exp(-1):
            count += 1
        counts.append(count)
    return counts
