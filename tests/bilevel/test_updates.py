import pytest
import torch
from torch import Tensor

from synthrepro.bilevel import sgd
from synthrepro.bilevel.updates import State


def bowl(params: dict[str, Tensor]) -> Tensor:
    return sum(((i + 1) * p.square() + p.sin()).sum() for i, p in enumerate(params.values()))


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (3, 2), "bias": (3,), "gain": ()}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def tensors(state: State) -> list[Tensor]:
    return [t for moment in state.values() if isinstance(moment, dict) for t in moment.values()]


def test_update_takes_the_steps_of_torch_optim_to_float64_rounding(case):
    update = case.update()
    theirs = {n: p.clone().requires_grad_() for n, p in start().items()}
    optimiser = case.optimiser(list(theirs.values()))
    params, state = start(), update.init(start())
    for step in range(1, 7):
        optimiser.zero_grad()
        bowl(theirs).backward()
        optimiser.step()
        leaves = {n: p.requires_grad_() for n, p in params.items()}
        gradients = dict(zip(leaves, torch.autograd.grad(bowl(leaves), list(leaves.values())), strict=True))
        params, state = update.step({n: p.detach() for n, p in leaves.items()}, gradients, state)
        assert state["step"] == step
        for name, p in params.items():
            torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-14, atol=1e-15)


def test_update_writes_into_nothing_that_it_is_given(case):
    update = case.update()
    params, gradients = start(), start()
    _, state = update.step(params, gradients, update.init(params))
    given = [*params.values(), *gradients.values(), *tensors(state)]
    copies = [t.clone() for t in given]
    update.step(params, gradients, state)
    assert state["step"] == 1
    for t, copy in zip(given, copies, strict=True):
        assert torch.equal(t, copy)


def test_update_is_differentiable_in_the_gradients(case):
    update = case.update()
    params, names = start(), list(start())
    _, state = update.step(params, start(), update.init(params))

    def stepped(*gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(update.step(params, dict(zip(names, gradients, strict=True)), state)[0].values())

    gradients = tuple((0.5 * g + 1).requires_grad_() for g in start().values())
    assert torch.autograd.gradcheck(stepped, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_moves_nothing_and_has_a_finite_derivative(case, dtype):
    update = case.update() if "weight_decay" not in case.options else case.update(weight_decay=0.0)
    params = start(dtype)
    gradients = {n: torch.zeros_like(p).requires_grad_() for n, p in params.items()}
    stepped, _ = update.step(params, gradients, update.init(params))
    slopes = torch.autograd.grad([p.sum() for p in stepped.values()], list(gradients.values()))
    for name, slope in zip(params, slopes, strict=True):
        assert torch.equal(stepped[name], params[name])
        assert slope.isfinite().all()


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="Nesterov momentum needs momentum > 0"):
        sgd(lr=0.1, nesterov=True)
