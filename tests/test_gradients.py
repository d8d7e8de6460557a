"""Communication between ranks: two processes over gloo."""

import torch
import torch.multiprocessing

from align_cli import distributed

SHAPES = [(3,), (5, 7), (), (1000,), (2, 2)]


def gradients(rank: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    made = [torch.randn(shape, generator=draw) for shape in SHAPES]
    return [made[0], made[1].T, *made[2:], made[0].bfloat16(), made[3].double()]


def average(rank: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    expected = gradients(rank)
    for tensor in expected:
        # one at a time
        whole = tensor.contiguous()
        torch.distributed.all_reduce(whole)
        tensor.copy_(whole / 2)
    exchanges, plain = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: exchanges.append(len(tensor)) or plain(tensor)
    found = gradients(rank)
    distributed.average(found)
    assert exchanges == [3 + 35 + 1 + 1000 + 4, 3, 1000]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    distributed.BUCKET = 200
    exchanges.clear()
    found = gradients(rank)
    distributed.average(found)
    # a tensor is never split
    assert exchanges == [3 + 35 + 1, 1000, 4, 3, 1000]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_many_at_a_time_to_the_same_numbers(tmp_path):
    torch.multiprocessing.spawn(average, (str(tmp_path / "store"),), nprocs=2)


def test_one_process_has_nothing_to_average():
    tensor = torch.ones(3)
    distributed.average([tensor])
    assert tensor.tolist() == [1, 1, 1]
