"""One process of several, started by test_processes.py: every estimator on its share of a batch, against the whole.

    python -m torch.distributed.run --nproc-per-node 2 tests/bilevel/joined.py [LOST]

With a rank LOST, that process kills itself in the middle of the second step.
"""

import os
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from synthrepro.bilevel import Step, adam, hypergradient, rmsprop, sgd, stateless
from synthrepro.bilevel.levels import Level, chain


def two_levels(inner, outer, params, hparams, update, state, group=None, **options):
    """The first layers of the network take a step, then the last one does, which sees the first ones stepped."""
    first = {name: p for name, p in params.items() if name < "2"}
    last = {name: p for name, p in params.items() if name > "2"}
    moments = state or {"first": None, "last": None}
    levels = [
        Level("first", lambda p, up: inner(p | last, up["hparams"]), first, update, moments["first"]),
        Level("last", lambda p, up: inner(up["first"] | p, up["hparams"]), last, update, moments["last"]),
    ]
    found = chain(levels, lambda up: outer(up["first"] | up["last"], up["hparams"]), hparams, group=group, **options)
    stepped = found.params["first"] | found.params["last"]
    return Step(found.hypergradient, stepped, found.state, found.losses["last"], found.outer_loss)


ESTIMATORS = {
    "exact": {},
    "exact, recompute": {"estimator": "exact", "recompute": True},
    "finite_difference": {"radius": 1e-2, "scheme": "central"},
    "unrolled": {"steps": 3},
    "unrolled, checkpoint": {"estimator": "unrolled", "steps": 5, "checkpoint": True, "truncate": 4},
    "chain": {"estimator": two_levels},
    "chain, finite difference": {
        "estimator": partial(two_levels, estimator="finite_difference"),
        "scheme": "central",
        "radius": 1e-2,
    },
    "neumann": {"terms": 4, "lr": 0.05},
    "conjugate_gradient": {"iterations": 6, "damping": 20.0, "tolerance": 0.0},
}
UPDATES = {"sgd": sgd(0.1, momentum=0.9), "adam": adam(0.02), "rmsprop": rmsprop(0.02)}


def losses(network, white, images):
    """Of a share of the batch; a mean over samples, so that the mean over equal shares is that of the whole."""

    def inner(params, hparams):
        painted = hparams["brightness"] * images + hparams["noise"] * white
        return F.mse_loss(stateless(network, params, painted), images)

    def outer(params, hparams):
        return F.mse_loss(hparams["scale"] * stateless(network, params, images), images.square())

    return inner, outer


def one_sided(rank, group, images):
    """A hyperparameter that one process alone uses, and a loss that one process alone finds infinite."""
    params = {"0.w": torch.ones(()).double(), "3.w": torch.ones(()).double()}
    hparams = {name: torch.ones(()).double() for name in ("both", "first")}

    def inner(p, h):
        used = h["both"] + (h["first"] if rank == 0 else 0)
        return (used * p["0.w"] * p["3.w"] * images).square().mean()

    def outer(p, h):
        return (p["0.w"] * p["3.w"] * images).mean()

    for estimator in ("exact", "finite_difference", two_levels):
        found = hypergradient(inner, outer, params, hparams, sgd(0.1), estimator=estimator, group=group)
        assert found.hypergradient["first"] != 0
    try:
        hypergradient(lambda p, h: inner(p, h) / (rank - 1), outer, params, hparams, sgd(0.1), group=group)
    except ValueError as error:
        os.write(sys.stdout.fileno(), f"\n{rank}: {error}\n".encode())


def distance(a, b):
    """Relative, over all tensors together."""
    a, b = (torch.cat([t.reshape(-1) for t in tensors.values()]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())


def main(lost: int | None) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same network and batch in every process
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    network = network.double()
    white, images = torch.randn(2, 2 * size, 1, 6, 6, dtype=torch.float64)
    hparams = {name: torch.tensor(value).double() for name, value in (("brightness", 0.9), ("noise", 0.2))}
    hparams["scale"] = torch.full((1, 1, 1), 1.1, dtype=torch.float64)
    params = dict(network.named_parameters())
    mine = slice(2 * rank, 2 * rank + 2)
    whole, share = losses(network, white, images), losses(network, white[mine], images[mine])

    sent = []
    all_reduce = dist.all_reduce

    def counted(flat, **options):
        sent.append(flat.nbytes)
        return all_reduce(flat, **options)

    dist.all_reduce = counted
    warnings.simplefilter("ignore")
    for name, options in ESTIMATORS.items():
        options = {"estimator": name} | options
        for update_name, update in UPDATES.items():
            start = params, hparams, update
            wanted, state = [], None  # two steps, so that moments are carried
            for _ in range(2):
                wanted.append(hypergradient(*whole, *start, state, **options))
                start, state = (wanted[-1].params, hparams, update), wanted[-1].state
            start, state = (params, hparams, update), None
            for i, single in enumerate(wanted):
                if i == 1 and rank == lost:
                    os.kill(os.getpid(), signal.SIGKILL)
                sent.clear()
                found = hypergradient(*share, *start, state, group=group, **options)
                start, state = (found.params, hparams, update), found.state
                worst = max(
                    distance(found.hypergradient, single.hypergradient),
                    distance(found.params, single.params),
                    abs(float(found.inner_loss / single.inner_loss - 1)),
                    abs(float(found.outer_loss / single.outer_loss - 1)),
                )
            line = f"\n{rank}|{name}|{update_name}|{worst:.3e}|{len(sent)}|{sum(sent)}\n"
            os.write(sys.stdout.fileno(), line.encode())  # at once: processes share the stream
    one_sided(rank, group, images[mine])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
