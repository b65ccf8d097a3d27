"""What breaks a derivative of the inner gradient: made to work where torch can, else refused in one sentence.

An estimator evaluates a loss more than once, differentiates its gradient, and gives it parameters other than the
network's own. Much that is harmless in ordinary training then raises an obscure error or, worse, gives a wrong
number without one. Not seen are writes that leave no trace in a tensor's version counter: through ``.data``, by
optimisers with ``fused=True``, or through NumPy.

Hooks on all modules, the choice of attention kernels and the stance of the compiler belong to the process. The
contexts restore them on leaving, also after an error, and may be nested; only one thread at a time should be in them.
Modules that other threads call meanwhile are not checked.
"""

import functools
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from .updates import Tensors

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")
# The words of torch for a backward pass that cannot be differentiated; the group is the operation.
NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?_?(\w+?)(?:_backward)?\b.* is not implemented"
    r"|Trying to backward through (\S+) but no autograd formula was registered"
)


@contextmanager
def evaluating(*given: Tensors) -> Iterator[None]:
    """Watch one evaluation of a loss, and its gradient, for what an estimator cannot allow.

    It costs little, a few lines of Python for each call of a module.

    Args:
        given: The named tensors that the loss is called with.

    Raises:
        ValueError: A network inside DistributedDataParallel, FSDP or DataParallel was called; a module in
            training mode wrote its buffers (BatchNorm outside of :func:`~synthrepro.bilevel.stateless`); a tensor of
            ``given`` was written in place; a checkpoint computed a module again with other parameters than before.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Nothing can be differentiated inside torch.inference_mode(): leave it, or use no_grad there.")
    watch = _Watch(given)
    _watches.append(watch)
    modules._global_forward_pre_hooks[_HOOK] = _before_call
    modules._global_forward_hooks[_HOOK] = _after_call
    try:
        yield
    except RuntimeError:
        watch.check_writes()  # the likely cause where autograd misses a version that it saved
        raise
    else:
        watch.check_writes()
        watch.check_buffers()
    finally:
        _watches.remove(watch)
        if not _watches:
            del modules._global_forward_pre_hooks[_HOOK], modules._global_forward_hooks[_HOOK]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute with what has second derivatives: around the inner loss, its gradient *and* the product with that.

    ``F.scaled_dot_product_attention`` takes its plain kernel, the only one that has them (and that keeps the B x
    heads x L x S weights). What ``torch.compile`` made runs uncompiled; a compiled module then makes torch warn of
    global hooks, once. A non-reentrant checkpoint computes again during the product, hence the context there too.

    Raises:
        ValueError: An operation without a second derivative, named.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and to import it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        except RuntimeError as error:
            if not (match := NO_SECOND_DERIVATIVE.search(str(error))):
                raise
            raise _only_once(next(filter(None, match.groups()))) from error


def check_graph(loss: Tensor, *, twice: bool) -> None:
    """Look for functions in the graph of a loss whose terms ``torch.autograd.grad`` would leave out in silence.

    A function without the mark ``once_differentiable`` whose backward builds no graph cannot be told from a correct
    one.

    Args:
        loss: The loss, of any shape.
        twice: Whether its gradient is differentiated as well.

    Raises:
        ValueError: A reentrant checkpoint; with ``twice``, an autograd function marked ``once_differentiable``.
    """
    todo = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        function = getattr(node, "_forward_cls", None)  # of functions written in Python
        if function is CheckpointFunction:
            raise ValueError(
                "The loss holds a reentrant checkpoint, through which torch.autograd.grad does not go: "
                "call torch.utils.checkpoint.checkpoint with use_reentrant=False."
            )
        if twice and function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise _only_once(function.__name__)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        todo += new


def refuse_inference(tensors: Tensors) -> None:
    """Raise ValueError where a tensor was made inside ``torch.inference_mode``."""
    for name, t in tensors.items():
        if t.is_inference():
            raise ValueError(
                f"{name!r} was made inside torch.inference_mode() and cannot be differentiated: "
                "make it outside, or give a clone of it."
            )


def refuse_wrapped(module: nn.Module) -> None:
    """Raise ValueError for a network that a data-parallel wrapper holds."""
    wrapper = _wrapper(type(module))  # type: ignore[arg-type]
    if wrapper:
        raise ValueError(
            f"{wrapper} does not average the gradients that torch.autograd.grad computes: call the bare network "
            "(its .module) in the losses; the estimators average over the processes of their group themselves."
        )


def _mark(ctx: Any) -> None: ...


_ONCE = once_differentiable(_mark).__code__  # all functions so marked share this code


def _only_once(operation: str) -> ValueError:
    return ValueError(
        f"{operation} in the loss has no second derivative in torch: put another operation in its place, "
        "or take the estimator finite_difference, which needs none."
    )


class _Watch:
    """What one evaluation is given and what its modules do."""

    def __init__(self, given: tuple[Tensors, ...]) -> None:
        self.thread = threading.get_ident()
        self.versions = [(name, t, t._version) for tensors in given for name, t in tensors.items()]
        self.before: dict[int, list[tuple[str, Tensor, int]]] = {}  # buffers of the modules being called, by id
        self.written: list[tuple[nn.Module, str, Tensor]] = []
        self.swapped: dict[int, nn.Module] = {}  # called with parameters that are not their own, by id

    def check_writes(self) -> None:
        for name, t, version in self.versions:
            if t._version != version:
                raise ValueError(
                    f"The loss wrote {name!r} in place: compute from the tensors that it is called with and "
                    "leave them as they are (no optimiser step, no add_, no copy_); the update takes the step."
                )

    def check_buffers(self) -> None:
        for module, name, buffer in self.written:
            if module._buffers.get(name) is buffer:  # it is not where functional_call had put a copy in its place
                raise ValueError(
                    f"{type(module).__name__} wrote its buffer {name!r} while the loss was evaluated, which may "
                    "happen several times: call the network through synthrepro.bilevel.stateless and refresh the "
                    "statistics afterwards (torch.optim.swa_utils.update_bn), or use its eval mode, or GroupNorm."
                )


_watches: list[_Watch] = []
# One number and functions, where register_module_forward_hook counts on and closures differ, or torch.compile would
# compile a loss again at each evaluation.
_HOOK = RemovableHandle(OrderedDict()).id


def _watching() -> tuple[_Watch | None, bool]:
    """The innermost watch, if it concerns this thread, and whether a backward pass (a checkpoint) is calling.

    A backward pass on a GPU has a thread of its own.
    """
    last = _watches[-1:]  # empty where another thread calls a module just as the context is left
    if torch.compiler.is_compiling() or not last:
        return None, False
    backward = torch._C._current_graph_task_id() != -1
    return (last[0] if backward or last[0].thread == threading.get_ident() else None), backward


def _before_call(module: nn.Module, args: Any) -> None:
    watch, backward = _watching()
    if watch is None:
        return
    refuse_wrapped(module)
    for p in module._parameters.values():
        if p is not None:
            if not isinstance(p, nn.Parameter):
                watch.swapped[id(module)] = module
            elif backward and id(module) in watch.swapped:
                raise ValueError(
                    f"A checkpoint in the network computes {type(module).__name__} again with the network's own "
                    "parameters, not with those that stateless gave it: take it out of the network, and in the loss "
                    "call checkpoint(stateless, block, its_params, x, use_reentrant=False)."
                )
            break
    if module.training and module._buffers:  # torch 2.8's InstanceNorm rewrites the same values in eval mode
        passing = module._non_persistent_buffers_set  # caches
        watch.before[id(module)] = [
            (name, b, b._version)
            for name, b in module._buffers.items()
            if b is not None and name not in passing and not b.is_inference()
        ]


def _after_call(module: nn.Module, args: Any, output: Any) -> None:
    if not module._buffers or (watch := _watching()[0]) is None:
        return
    for name, before, version in watch.before.pop(id(module), ()):
        now = module._buffers.get(name)
        if now is not None and (now is not before or now._version != version):
            watch.written.append((module, name, now))


@functools.cache
def _wrapper(kind: type[nn.Module]) -> str | None:
    """The data-parallel wrapper that a class is or derives from; by name, for to import them is slow."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in WRAPPERS), None)
