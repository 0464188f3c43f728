"""The processes of a training: one, or as many as torchrun started.

    torchrun --nproc-per-node 2 --max-restarts 3 -m ldm.train ...

Starting them, and all of them anew where one dies, is torchrun's; gradients are DistributedDataParallel's.
"""

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def join() -> None:
    """Joins the others where torchrun started this process. They wait long for one that draws pictures; where one dies,
    its connections do, and they notice at once."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun's store outlives the processes: new ones would find the addresses of the dead (pytorch issue 135712).
        # The count of restarts keeps them apart; where there are several machines, it is not the same on all.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    atexit.register(leave)


def leave() -> None:
    """Ends the group, whose threads, still at work, else may abort the exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values: float) -> list[float]:
    """Each value's sum over the processes, in float64: the same for all of them."""
    sums = torch.tensor(values, dtype=torch.float64)
    if count() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def told(value: T) -> T:
    """What the first process has in the place of `value`."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def first() -> Iterator[None]:
    """The first process alone, then the others: what it writes, they find."""
    join()
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()


def share(net: nn.Module) -> nn.Module:
    """`net` as one whose processes exchange their gradients; all get the weights that the first has. A sharded net, or
    that of one process, is what it was."""
    if count() == 1 or any(isinstance(p, DTensor) for p in net.parameters()):
        return net
    return DistributedDataParallel(net, gradient_as_bucket_view=True)


def shard(net: nn.Module, parts: Iterable[nn.Module] = ()) -> None:
    """Divides each parameter, so its gradient and its optimiser's state, among the processes (FSDP, Zhao et al. 2023):
    for nets of which one machine holds no more than a part. A process has the whole weights of one of the `parts` at a
    time, and of what is in none of them. Call it before the optimisers are made."""
    join()
    for part in parts:
        fully_shard(part)
    fully_shard(net)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on all processes at once; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, sharded as `other` is."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor
