"""Ensembles of reward models: several heads on one trunk, each trained on a bootstrap sample of the groups."""

from __future__ import annotations

import math
import random

from align_cli.training.layout import Row


def drawn(row: Row, seeds: list[int]) -> list[int]:
    """How often each head counts a group: Poisson(1), the online bootstrap (Oza 2005). Seeded by the group's content,
    so that ranks and resumed runs agree."""
    counts = []
    for seed in seeds:
        draw, count, product = random.Random(f"{seed} {row['prompt_ids']} {row['responses']}"), 0, 1.0
        while (product := product * draw.random()) > math.exp(-1):
            count += 1
        counts.append(count)
    return counts
