r"""Convolution, normalisation and activation with second derivatives written by hand.

An exact hypergradient differentiates the inner gradient, and where torch does that it pays three times over. It keeps
up to six maps a layer (of convolution, norm and activation), where four determine everything: the output of the norm
and the gradient there are cheap to compute again. Its second derivatives of norm and activation are chains of
elementwise passes. And it always computes the adjoint of a convolution's weights, which nobody reads: 11 convolutions
a layer for a hypergradient where 10 do, for a plain step's 3.

Inside :func:`fused_kernels` the functions in ``torch.nn.functional`` that networks call for these layers give the
same values and the same gradients, differentiable once more, without that cost::

    with fused_kernels():
        loss = inner_loss(params, hparams)
    g = torch.autograd.grad(loss, params, create_graph=True)
    torch.autograd.grad(g, hparams, u)

The second derivative of a norm is that of x -> (x - mean) * rstd as in the usual backward pass (Ioffe & Szegedy 2015,
section 3; Wu & He 2018), differentiated once more: every adjoint is a combination of the maps v (adjoint of the
gradient), p (incoming gradient), x and 1, with one coefficient a sample and channel that sums over space give.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def fused_kernels() -> AbstractContextManager[Any]:
    """Context in which the layers of a network keep less for a second derivative and compute it in fewer passes.

    Enter it for the evaluation of the loss alone; gradients may be taken inside or outside. It acts on batches in
    float32 and float64 outside of autocast, on any device; on CPU in float32 it lays 2-D and 3-D maps out with
    channels last:

    - ``conv1d`` to ``conv3d`` and ``conv_transpose1d`` to ``conv_transpose3d`` (numeric padding);
    - ``group_norm``, ``instance_norm`` without running statistics, ``batch_norm`` in training;
    - ``relu``, ``leaky_relu``, ``elu`` (alpha 1), ``silu``, ``gelu`` (no approximation), ``prelu``, none of them in
      place. One that follows a norm directly keeps no map of its own;
    - ``cat``.

    Everything else is torch's own, unchanged. Whatever is differentiated towards is computed and nothing else: the
    adjoint of the weights, which :func:`~synthrepro.bilevel.unrolled` reads, is there when asked for.

    The output of a norm that an activation follows is not in the graph of what comes after: do not differentiate
    towards it. Inside :func:`torch.utils.checkpoint.checkpoint` enter it within the checkpointed function. Inside
    :func:`~synthrepro.bilevel.stacked` it does nothing.

    It pays where maps are large. Every layer costs some more calls, so time it on small images, and on volumes, before
    you use it there (``benchmarks/hypergradient.py`` has both UNets and several sizes in 2-D).

    Raises:
        RuntimeError: On a third derivative, when ``create_graph=True`` is given for the second one.
    """
    return _Fused()


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = _OURS.get(func)
        if ours is not None and torch.is_grad_enabled():
            result = ours(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ours act: on batches of one dtype of full precision, where a gradient may be asked for."""
    given = [x, *(t for t in others if t is not None)]
    return (
        x.dtype in (torch.float32, torch.float64)
        and all(t.dtype == x.dtype for t in given)
        and any(t.requires_grad for t in given)
        and x.dim() > 2
        and x.numel() > 0
        and not torch.is_autocast_enabled(x.device.type)
    )


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last where x lies so, else channels first."""
    last = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def _dense(t: Tensor, like: Tensor | None = None) -> Tensor:
    return t.contiguous(memory_format=_layout(t if like is None else like))


def _wanted(ctx: Any) -> list[bool]:
    """For each tensor given to a Function, in order: whether the running backward pass needs its gradient.

    ``ctx.needs_input_grad`` says only whether a tensor requires one, and parameters do even in a pass towards
    hyperparameters alone. A leaf that is asked for is one that torch refuses to answer about.
    """

    def runs(node: Any) -> bool:
        try:
            return node is not None and torch._C._will_engine_execute_node(node)
        except RuntimeError as error:
            if "leaf node" not in str(error):
                raise
            return True

    return [runs(node) for node, _ in ctx.next_functions]


def _second(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward of a backward, which is not differentiable."""

    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        # torch's once_differentiable would let the dependence on saved tensors pass silently
        if torch.is_grad_enabled():
            raise RuntimeError("fused_kernels() has no third derivatives: leave create_graph=True out of the second.")
        return backward(ctx, *gradients)

    return checked


# --- Convolution ------------------------------------------------------------------------------------------------------


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return aten.convolution(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> Any:
        if gy is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        mask = [*_wanted(ctx), False][:3]
        return *_ConvBackward.apply(gy, x, weight, ctx.how, mask), None


class _ConvBackward(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, how: tuple[Any, ...], mask: list[bool]) -> Any:
        ctx.save_for_backward(gy, x, weight)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return aten.convolution_backward(gy, x, weight, [gy.shape[1]], *how, mask)

    @staticmethod
    @_second
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, u_bias: Tensor | None) -> Any:
        """v, u and u_bias are the adjoints of the gradients towards x, weight and bias."""
        gy, x, weight = ctx.saved_tensors
        to_gy, to_x, to_weight = _wanted(ctx)
        a_gy = a_x = a_weight = None
        if to_gy:
            parts = [aten.convolution(a, w, None, *ctx.how) for a, w in ((v, weight), (x, u)) if not _none(a, w)]
            if u_bias is not None:
                parts.append(u_bias.view(-1, *[1] * (gy.dim() - 2)).expand_as(gy))
            a_gy = _sum(parts)
        if to_x and u is not None:
            a_x = aten.convolution_backward(gy, x, u, None, *ctx.how, [True, False, False])[0]
        if to_weight and v is not None:
            a_weight = aten.convolution_backward(gy, v, weight, None, *ctx.how, [False, True, False])[1]
        return a_gy, a_x, a_weight, None, None


def _none(*tensors: Tensor | None) -> bool:
    return any(t is None for t in tensors)


def _sum(parts: Iterable[Tensor]) -> Tensor | None:
    total = None
    for part in parts:
        total = part if total is None else total.add_(part)
    return total


def _convolution(dims: int, transposed: bool) -> Callable[..., Tensor | None]:
    def each(value: Any) -> list[int] | None:
        values = [value] * dims if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    def conv(x, weight, bias, stride, padding, output_padding, groups, dilation):  # type: ignore[no-untyped-def]
        if not _fits(x, weight, bias) or x.dim() != dims + 2 or isinstance(padding, str):
            return None
        if x.device.type == "cpu" and x.dtype == torch.float32 and dims > 1:
            # nearly all that follows is faster so, with pooling and interpolation; softmax over few channels is not
            x = x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
        how = (each(stride), each(padding), each(dilation), transposed, each(output_padding), groups)
        y = _Conv.apply(x, weight, bias, how)
        return y.contiguous() if y.shape[1] < 8 else y

    def usual(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
        return conv(input, weight, bias, stride, padding, 0, groups, dilation)

    def transpose(  # type: ignore[no-untyped-def]
        input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        return conv(input, weight, bias, stride, padding, output_padding, groups, dilation)

    return transpose if transposed else usual


# --- Concatenation ----------------------------------------------------------------------------------------------------


class _Cat(Function):
    """torch's own fills a map with zeros for each part when its backward is differentiated."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [p.shape[dim] for p in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, *_Split.apply(g, ctx.dim, ctx.sizes)


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, dim: int, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.dim = dim
        layout = _layout(g)
        return tuple(p.clone(memory_format=layout) for p in g.split(sizes, dim))

    @staticmethod
    @_second
    def backward(ctx: Any, *v: Tensor) -> Any:
        return torch.cat(v, ctx.dim), None, None


def _cat(tensors, dim=0, **other):  # type: ignore[no-untyped-def]
    if other or not tensors or not _fits(*tensors) or any(t.dim() != tensors[0].dim() for t in tensors):
        return None
    return _Cat.apply(dim, *tensors)


# --- Normalisation and activation -------------------------------------------------------------------------------------


class _Act(NamedTuple):
    """An activation f, elementwise; ``w`` is PReLU's weight, broadcast like z, and None elsewhere."""

    value: Callable[[Tensor, Any], Tensor]
    backward: Callable[[Tensor, Tensor, Any], Tensor]  # (g, z, w) -> g f'(z)
    derivatives: Callable[[Tensor, Any], tuple[Tensor, Tensor | None]]  # (z, w) -> f', f''; None is zero


def _positive(z: Tensor) -> Tensor:
    """1 where z > 0, else 0."""
    return aten.threshold_backward(torch.ones_like(z), z, 0)


def _silu_derivatives(z: Tensor, w: Any) -> tuple[Tensor, Tensor | None]:
    s = torch.sigmoid(z)
    ds = torch.addcmul(s, s, s, value=-1)
    curvature = s.mul(-2).add_(1).mul_(z).add_(2).mul_(ds)  # s' (2 + z (1 - 2 s))
    return s.addcmul_(z, ds), curvature


def _gelu_derivatives(z: Tensor, w: Any) -> tuple[Tensor, Tensor | None]:
    square = z.square()
    density = square.mul(-0.5).exp_().mul_((2 * torch.pi) ** -0.5)
    slope = torch.special.ndtr(z).addcmul_(z, density)
    return slope, square.neg_().add_(2).mul_(density)


def _elu_derivatives(z: Tensor, w: Any) -> tuple[Tensor, Tensor | None]:
    slope = z.clamp_max(0).exp_()
    return slope, aten.threshold_backward(slope, z.neg(), 0)


def _leaky(slope: float) -> _Act:
    return _Act(
        lambda z, w: F.leaky_relu(z, slope),
        lambda g, z, w: aten.leaky_relu_backward(g, z, slope, False),
        lambda z, w: (_positive(z).mul_(1 - slope).add_(slope), None),
    )


def _prelu_slope(z: Tensor, w: Any) -> Tensor:
    return _positive(z).mul_(1 - w).add_(w)


_RELU = _Act(
    lambda z, w: torch.relu(z), lambda g, z, w: aten.threshold_backward(g, z, 0), lambda z, w: (_positive(z), None)
)
_SILU = _Act(lambda z, w: F.silu(z), lambda g, z, w: aten.silu_backward(g, z), _silu_derivatives)
_GELU = _Act(lambda z, w: F.gelu(z), lambda g, z, w: aten.gelu_backward(g, z), _gelu_derivatives)
_ELU = _Act(lambda z, w: F.elu(z), lambda g, z, w: aten.elu_backward(g, 1, 1, 1, False, z), _elu_derivatives)
_PRELU = _Act(
    lambda z, w: torch.where(z > 0, z, w * z),
    lambda g, z, w: _prelu_slope(z, w).mul_(g),
    lambda z, w: (_prelu_slope(z, w), None),
)


class _Norm(NamedTuple):
    """Normalisation over space and channels of a group, or over space and batch if ``groups`` is None."""

    groups: int | None
    eps: float

    def forward(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n, c = x.shape[:2]
        if self.groups is not None and x.is_contiguous():
            z, mean, rstd = torch.native_group_norm(x, gamma, beta, n, c, x[0, 0].numel(), self.groups, self.eps)
            size = c // self.groups
            return z, mean.repeat_interleave(size, 1), rstd.repeat_interleave(size, 1)  # (N, C)
        # torch's is erratically slow in channels last
        (mean,) = self.average(x, _total(x))
        centred = x - _channels(mean, x)
        (var,) = self.average(x, _dot(centred, centred))
        rstd = (var + self.eps).rsqrt()
        z = centred.mul_(_channels(rstd if gamma is None else rstd * gamma, x))
        return z if beta is None else z.add_(_channels(beta, x)), mean, rstd

    def backward(
        self, g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = 1 if gamma is None else gamma
        sum_g = _total(g)
        sum_gx = rstd * (_dot(g, x) - mean * sum_g)  # with x normalised
        m1, m2 = self.average(x, scale * sum_g, scale * sum_gx)
        to_x = -rstd * rstd * m2
        gx = _combined((g, scale * rstd), (x, to_x), constant=-rstd * m1 - mean * to_x)
        return gx, sum_gx.sum(0), sum_g.sum(0)

    def again(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        """The output of :meth:`forward` in fewer passes."""
        slope = rstd if gamma is None else rstd * gamma
        return _combined((x, slope), constant=(0 if beta is None else beta) - mean * slope)

    def average(self, x: Tensor, *sums: Tensor) -> Iterable[Tensor]:
        """Mean over the set, for each sample and channel, from each of the sums over space (N, C)."""
        n, c = x.shape[:2]
        together = torch.stack(sums) / (x.numel() // (c if self.groups is None else n * self.groups))
        if self.groups is None:
            together = together.sum(1, keepdim=True).expand_as(together)
        elif self.groups < c:
            grouped = together.view(-1, n, self.groups, c // self.groups)
            together = grouped.sum(-1, keepdim=True).expand_as(grouped).reshape(-1, n, c)
        return together.unbind()


class _Layer(Function):
    """A norm, an activation, or an activation of a norm; of the last only the input of the norm is kept."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, gamma, beta, w, norm: _Norm | None, act: _Act | None, z=None, mean=None, rstd=None
    ) -> Tensor:
        if z is None:
            z, mean, rstd = (x, None, None) if norm is None else norm.forward(x, gamma, beta)
        ctx.save_for_backward(x, gamma, beta, w, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.act = norm, act
        return z if act is None else act.value(z, _channels(w, x))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # once: a checkpoint unpacks each tensor a single time
        wanted = _by_argument(ctx, saved[:4])
        return *_LayerBackward.apply(g, *saved, ctx.norm, ctx.act, wanted), *(None,) * 5


class _LayerBackward(Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, g, x, gamma, beta, w, mean, rstd, norm: _Norm | None, act: _Act | None, wanted: list[bool]
    ):
        g = _dense(g, x)
        ctx.save_for_backward(g, x, gamma, beta, w, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.act = norm, act
        gz, gw = g, None
        if act is not None:
            z = x if norm is None else norm.again(x, gamma, beta, mean, rstd)
            if wanted[3]:
                gw = _fold(g * z.clamp_max(0), w)
            gz = act.backward(g, z, _channels(w, x))
        if norm is None:
            return gz, None, None, gw
        gx, g_gamma, g_beta = norm.backward(gz, x, gamma, mean, rstd)
        return gx, g_gamma if wanted[1] else None, g_beta if wanted[2] else None, gw

    @staticmethod
    @_second
    def backward(ctx: Any, v: Any, u_gamma: Any, u_beta: Any, u_w: Any) -> Any:
        """v and the u's are the adjoints of the gradients towards x, gamma, beta and w; see the module's docstring."""
        g, x, gamma, beta, w, mean, rstd = ctx.saved_tensors
        norm, act = ctx.norm, ctx.act
        _, _, to_gamma, to_beta, to_w = _by_argument(ctx, (g, x, gamma, beta, w))
        a_gamma = a_beta = a_w = None
        v = torch.zeros_like(x) if v is None else _dense(v, x)
        if norm is None:
            z, h = x, v
        else:
            z = x if act is None else norm.again(x, gamma, beta, mean, rstd)
        slope, curvature = (None, None) if act is None else act.derivatives(z, _channels(w, x))
        gz = g if slope is None else g * slope
        if norm is not None:
            scale = 1 if gamma is None else gamma
            u_gamma = 0 if u_gamma is None else u_gamma
            u_beta = 0 if u_beta is None else u_beta
            mu, r = mean, rstd  # (N, C), like all that follow
            sum_g, sum_v, sum_vg = _total(gz), _total(v), _dot(v, gz)
            sum_gx, sum_vx = r * (_dot(gz, x) - mu * sum_g), r * (_dot(v, x) - mu * sum_v)  # with x normalised
            v1, v2, m1, m2, vp = norm.average(x, sum_v, sum_vx, *(scale * s for s in (sum_g, sum_gx, sum_vg)))
            # adjoint of gz
            to_x = r * (u_gamma - scale * r * v2)
            h = _combined((v, scale * r), (x, to_x), constant=u_beta - scale * r * v1 - mu * to_x)
        a_g = h if slope is None else h * slope
        a_z = None if curvature is None else curvature.mul_(h).mul_(g)
        if u_w is not None:
            negative = 1 - _positive(z)
            a_g = a_g + _channels(u_w, x) * z.clamp_max(0)
            a_z = _channels(u_w, x) * g * negative
        if to_w:
            a_w = _fold(h * g * (1 - _positive(z)), w)
        if norm is None:
            return a_g, a_z, None, None, a_w, *(None,) * 5
        sum_z: Any = 0 if a_z is None else _total(a_z)
        sum_zx = 0 if a_z is None else r * (_dot(a_z, x) - mu * sum_z)
        # adjoint of the normalised x is q = -r (m2 v + v2 scale gz) + u_gamma gz + scale a_z
        to_gz, to_v = u_gamma - r * v2 * scale, -r * m2
        both = ((sum_v, sum_g, sum_z), (sum_vx, sum_gx, sum_zx))
        q1, q2 = norm.average(x, *(to_v * a + to_gz * b + scale * c for a, b, c in both))
        to_x = -r * r * (q2 + r * (vp - v1 * m1 - v2 * m2))
        terms = [(v, r * to_v), (gz, r * to_gz), (x, to_x)] + ([] if a_z is None else [(a_z, scale * r)])
        a_x = _combined(*terms, constant=-r * q1 - mu * to_x)
        if to_gamma:
            a_gamma = (r * (sum_vg - v1 * sum_g - v2 * sum_gx) + sum_zx).sum(0)
        if to_beta:
            a_beta = torch.zeros_like(beta) if a_z is None else sum_z.sum(0)
        return a_g, a_x, a_gamma, a_beta, a_w, *(None,) * 5


def _by_argument(ctx: Any, tensors: Iterable[Tensor | None]) -> list[bool]:
    """:func:`_wanted` with False for the arguments that are None."""
    wanted = iter(_wanted(ctx))
    return [t is not None and next(wanted) for t in tensors]


def _channels(t: Tensor | None, x: Tensor) -> Any:
    """A vector over channels, or a matrix over samples and channels, to broadcast with x."""
    return None if t is None else t.view(*t.shape[:-1], -1, *[1] * (x.dim() - 2))


def _space(t: Tensor) -> list[int]:
    return list(range(2, t.dim()))


def _total(t: Tensor) -> Tensor:
    return t.sum(_space(t))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(_space(a))


def _fold(t: Tensor, w: Tensor) -> Tensor:
    """Sum down to the shape of PReLU's weight: a channel's or a single one."""
    return _total(t).sum(0) if w.numel() > 1 else t.sum().view(1)


def _combined(first: tuple[Tensor, Tensor], *rest: tuple[Tensor, Tensor], constant: Tensor) -> Tensor:
    """Sum of maps times coefficients (N, C), plus a constant."""
    total = first[0] * _channels(first[1], first[0])
    for t, coefficient in rest:
        total.addcmul_(_channels(coefficient, t), t)
    return total.add_(_channels(constant, total))


def _normal(x: Tensor, weight: Tensor | None, bias: Tensor | None, values: int) -> bool:
    """Whether a norm over so many values is a valid one; torch says what is wrong with the others."""
    return values > 1 and all(t is None or t.shape == x.shape[1:2] for t in (weight, bias))


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    if not _fits(input, weight, bias) or num_groups < 1 or input.shape[1] % num_groups:
        return None
    if not _normal(input, weight, bias, input[0].numel() // num_groups):
        return None
    return _Layer.apply(_dense(input), weight, bias, None, _Norm(num_groups, eps), None)


def _instance_norm(  # type: ignore[no-untyped-def]
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not _fits(input, weight, bias) or running_mean is not None or not use_input_stats:
        return None
    if not _normal(input, weight, bias, input[0, 0].numel()):
        return None
    return _Layer.apply(_dense(input), weight, bias, None, _Norm(input.shape[1], eps), None)


def _batch_norm(  # type: ignore[no-untyped-def]
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if not training or momentum is None or not _fits(input, weight, bias):
        return None
    if not _normal(input, weight, bias, input[:, 0].numel()):
        return None
    if running_mean is not None:
        with torch.no_grad():
            var, mean = torch.var_mean(input.detach(), [0, *_space(input)])
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(var.to(running_var), momentum)
    return _Layer.apply(_dense(input), weight, bias, None, _Norm(None, eps), None)


def _activation(z: Tensor, act: _Act, w: Tensor | None = None) -> Tensor | None:
    if not _fits(z, w):
        return None
    node: Any = z.grad_fn
    packing = torch._C._autograd._top_saved_tensors_default_hooks(False)
    alone = (
        (packing is None or packing[0].__module__ != "torch.utils.checkpoint")
        and not z._backward_hooks
        and not z.retains_grad
    )
    if alone and getattr(node, "_forward_cls", None) is _Layer and node.act is None:
        x, gamma, beta, _, mean, rstd = node.saved_tensors
        return _Layer.apply(x, gamma, beta, w, node.norm, act, z.detach(), mean, rstd)
    return _Layer.apply(_dense(z), None, None, w, None, act)


def _relu(input, inplace=False):  # type: ignore[no-untyped-def]
    return None if inplace else _activation(input, _RELU)


def _silu(input, inplace=False):  # type: ignore[no-untyped-def]
    return None if inplace else _activation(input, _SILU)


def _gelu(input, approximate="none"):  # type: ignore[no-untyped-def]
    return None if approximate != "none" else _activation(input, _GELU)


def _elu(input, alpha=1.0, inplace=False):  # type: ignore[no-untyped-def]
    return None if inplace or alpha != 1 else _activation(input, _ELU)


def _leaky_relu(input, negative_slope=0.01, inplace=False):  # type: ignore[no-untyped-def]
    return None if inplace else _activation(input, _leaky(negative_slope))


def _prelu(input, weight):  # type: ignore[no-untyped-def]
    return _activation(input, _PRELU, weight)


_OURS: dict[Any, Callable[..., Tensor | None]] = {
    F.conv1d: _convolution(1, False),
    F.conv2d: _convolution(2, False),
    F.conv3d: _convolution(3, False),
    F.conv_transpose1d: _convolution(1, True),
    F.conv_transpose2d: _convolution(2, True),
    F.conv_transpose3d: _convolution(3, True),
    torch.cat: _cat,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    F.silu: _silu,
    F.gelu: _gelu,
    F.elu: _elu,
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
}
