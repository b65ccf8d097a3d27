"""One hypergradient over several processes: averages of gradients, and an error instead of a hang.

Every process evaluates the losses on its own share of the batch. Where both losses are means over samples and the
shares are of equal size, the mean of the processes' gradients is the gradient on the joined batch, and since a
hypergradient is built from gradients and from products that are linear in the loss, averaging is all it takes: the
inner gradient, the outer gradient, and the hypergradient at the end (:func:`~synthrepro.bilevel.exact`), each in one
all-reduce. No module is wrapped, and no collective is differentiated: wrapped in DistributedDataParallel,
``torch.autograd.grad`` does not synchronise at all, and every process goes its own way without a word.
"""

import functools
import re
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None  # of ``torch.distributed.init_process_group``; None for one process alone

LOST = re.compile("connection|timed out|broken pipe|peer", re.IGNORECASE)  # gloo's words for it

PATIENCE = 5.0  # seconds in which the survivors of a lost process report to one another


def averaged(tensors: Sequence[Tensor | None], like: Sequence[Tensor], group: Group) -> list[Tensor | None]:
    """Mean over the processes, in one all-reduce; ``None`` counts as zero, unless every process has None.

    Args:
        tensors: What this process found; anything of the shapes of ``like``.
        like: Gives shapes and types where ``tensors`` has None.
        group: The processes; with ``None`` the tensors are returned as they are.

    Raises:
        ConnectionError: A process is gone or does not answer; the message names its rank. The default process group
            is destroyed by then. NCCL reports a lost process later, unless ``TORCH_NCCL_BLOCKING_WAIT=1`` is set.
    """
    if group is None or not tensors:
        return list(tensors)
    size = dist.get_world_size(group)
    filled = [torch.zeros_like(t) if d is None else d.detach() for d, t in zip(tensors, like, strict=True)]
    kind = functools.reduce(torch.promote_types, (t.dtype for t in filled), torch.float32)  # sums overflow in halves
    home = next((t.device for t in filled if t.is_cuda), filled[0].device)
    here = torch.tensor([d is not None for d in tensors], dtype=kind, device=home)
    flat = torch.cat([here, *(t.reshape(-1).to(home, kind) for t in filled)])
    _all_reduce(flat, group)
    counts, *parts = flat.split([len(filled), *(t.numel() for t in filled)])
    return [
        (part / size).view_as(t).to(t) if count else None
        for count, part, t in zip(counts.tolist(), parts, filled, strict=True)
    ]


def _all_reduce(flat: Tensor, group: dist.ProcessGroup) -> None:
    rank = dist.get_rank()
    try:
        dist.all_reduce(flat, group=group)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        lost = ", ".join(map(str, _missing(rank, group)))
        raise ConnectionError(
            f"Rank {rank} lost {f'rank {lost}' if lost else 'a process'} while averaging gradients: look at what ended "
            "there first, and start the run again from its last checkpoint."
        ) from error


def _missing(rank: int, group: dist.ProcessGroup) -> list[int]:
    """Ranks that do not report within PATIENCE seconds; none where the store that they report to is gone as well."""
    waiting, lost = dist.get_process_group_ranks(group), list[int]()
    end = time.monotonic() + PATIENCE
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"synthrepro/alive/{rank}", "")
        dist.destroy_process_group()  # closes our connections, so that whoever waits for us notices too
        while waiting and time.monotonic() < end:
            time.sleep(0.05)
            lost = waiting = [other for other in waiting if not store.check([f"synthrepro/alive/{other}"])]
    except RuntimeError:
        pass
    return lost
