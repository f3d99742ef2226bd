"""What one of two processes does under DistributedDataParallel; see test_wrappers."""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from secateur.integrations import reshape, shape_state
from tests.integrations.training import a_pruner, batches, macs, network, step


def train() -> dict[str, Any]:
    """Two rounds on half of the data each; then again from the shapes alone."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = network()
    # Each process counts its own running statistics; a round nevertheless leaves the same model everywhere.
    wrapped = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=3
    )
    calls: list[int] = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    wrapped.register_comm_hook(None, _averaged)
    optimizer = torch.optim.Adam(wrapped.parameters(), 0.01)
    pruner = a_pruner(rounds=2, end=4, repair="batchnorm", allocator="tod")
    same = []
    for number in range(1, 7):
        step(wrapped, optimizer, batches(8)[2 * (number % 4) + rank])
        pruner.advance(wrapped, optimizer, step=number)
        own = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        same.append(torch.equal(*both))
    again = network()
    rewrapped = DistributedDataParallel(again)
    reshape(rewrapped, shape_state(wrapped))
    step(rewrapped, torch.optim.SGD(rewrapped.parameters(), 0.1), batches(8)[rank])
    found = {
        "same": same,
        "hooks": len(calls),
        "settings": (wrapped.gradient_as_bucket_view, wrapped.forward_sync_buffers, wrapped.bucket_bytes_cap),
        "state": {k: v.numpy() for k, v in model.state_dict().items()},
        "plan": sc.record_of(model).plan.to_json(),
        "macs": (macs(network()), macs(model), macs(again)),
        "averaged": len(_CALLS),
    }
    dist.destroy_process_group()
    return found


_CALLS: list[int] = []


def _averaged(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    _CALLS.append(1)
    work = dist.all_reduce(bucket.buffer() / 2, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
