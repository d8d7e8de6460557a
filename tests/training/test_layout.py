"""Both layouts: what each token sees, where responses end, how groups are cut into micro-batches."""

import pytest
import torch

from align_cli.training import layout

GROUPS = [
    {"prompt_ids": [5, 6, 7], "responses": [[8, 9], [10]]},
    {"prompt_ids": [5], "responses": [[11], [12, 13, 14], [15]]},
]


def test_a_shared_row_restarts_its_positions_at_the_prompts_end():
    packed = layout.shared(GROUPS, pad=0)
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [5, 11, 12, 13, 14, 15]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 3, 1]]
    assert packed.inputs["ends"].tolist() == [[4, 5, 0], [1, 4, 5]]
    assert packed.there.tolist() == [[True, True, False], [True, True, True]]
    assert packed.tokens == 12


def test_a_response_sees_the_prompt_and_itself():
    mask = layout.shared(GROUPS[:1], pad=0).inputs["attention_mask"][0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_nothing_sees_padding_and_no_row_of_the_mask_is_empty():
    longer = {"prompt_ids": [1], "responses": [[2], [3]]}
    mask = layout.shared([GROUPS[0], longer], pad=0).inputs["attention_mask"][1, 0]
    assert not mask[:3, 3:].any()
    assert mask.any(1).all()


def test_rows_hold_the_prompt_once_a_response():
    packed = layout.separate(GROUPS, pad=0)
    assert packed.inputs["input_ids"].tolist() == [
        [5, 6, 7, 8, 9],
        [5, 6, 7, 10, 0],
        [5, 11, 0, 0, 0],
        [5, 12, 13, 14, 0],
        [5, 15, 0, 0, 0],
    ]
    assert packed.inputs["ends"].flatten().tolist() == [4, 3, 1, 3, 1]
    assert packed.inputs["attention_mask"].sum(1).tolist() == [5, 4, 2, 4, 2]


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_values_at_the_ends_come_back_by_group(name):
    packed = layout.LAYOUTS[name](GROUPS, pad=0)
    ids, ends = packed.inputs["input_ids"], packed.inputs["ends"]
    last = ids.gather(1, ends).unsqueeze(2).float()
    assert packed.regroup(last).squeeze(2).tolist() == [[9, 10, 0], [11, 14, 15]]


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_micro_batches_hold_every_group_once_within_the_budget(name):
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt_ids": [1] * int(torch.randint(1, 30, (1,), generator=draw)),
            "responses": [[2] * int(torch.randint(1, 20, (1,), generator=draw)) for _ in range(2 + at % 8)],
        }
        for at in range(40)
    ]
    cut = layout.fill(rows, name, 200)
    assert sorted(at for part in cut for at in part) == list(range(40))
    for part in cut:
        packed = layout.LAYOUTS[name]([rows[at] for at in part], pad=0)
        assert packed.inputs["input_ids"].numel() <= 200 or len(part) == 1
