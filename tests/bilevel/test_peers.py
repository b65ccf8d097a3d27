"""Where a library's hypergradient is wrong, or of another quantity: what it gives, against central differences.

A test that fails here is good news: the library has been mended, and the book may say so.
"""

import logging
import warnings

import pytest
import torch
import torchopt

from synthrepro.bilevel import NotConverged, adam, hypergradient, sgd, unrolled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of higher's docstrings
    import higher

PARAMS = {"x": torch.tensor([0.3, -0.4, 1.1]).double(), "unused": torch.tensor([0.5]).double()}
HPARAMS = {"a": torch.tensor([0.8, 0.6, -0.7]).double()}
OPTIONS = {"lr": 0.05, "eps": 1e-3}


def inner(params, hparams):
    pull = (hparams["a"] * params["x"].sin() - 0.3).square().sum()
    return pull + 0 * (hparams["a"].sum() * params["unused"]).sum()  # a gradient of zero, at every theta


def outer(params, hparams):
    return (params["x"] - 0.2).square().sum() + 0.1 * params["unused"].sum()


def truth(steps):
    """Central differences of the whole procedure, the steps taken by torch.optim.Adam."""

    def after(a):
        params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
        optimiser = torch.optim.Adam(params.values(), **OPTIONS)
        for _ in range(steps):
            optimiser.zero_grad()
            inner(params, {"a": a}).backward()
            optimiser.step()
        return float(outer(params, {"a": a}).detach())

    hairs = 1e-6 * torch.eye(3).double()
    a = HPARAMS["a"]
    return torch.tensor([(after(a + hair) - after(a - hair)) / 2e-6 for hair in hairs], dtype=torch.float64)


def through_torchopt(steps, **options):
    a = HPARAMS["a"].clone().requires_grad_()
    params = tuple(p.clone().requires_grad_() for p in PARAMS.values())
    optimiser = torchopt.adam(**OPTIONS, **options)
    state = optimiser.init(params)
    for _ in range(steps):
        g = torch.autograd.grad(inner(dict(zip(PARAMS, params, strict=True)), {"a": a}), params, create_graph=True)
        updates, state = optimiser.update(g, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return torch.autograd.grad(outer(dict(zip(PARAMS, params, strict=True)), {"a": a}), a)[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_ours_is_right_with_a_parameter_that_gets_no_gradient(steps):
    found = unrolled([inner] * steps, outer, PARAMS, HPARAMS, adam(**OPTIONS)).hypergradient["a"]
    assert torch.allclose(found, truth(steps), rtol=1e-7)


def test_torchopt_gives_nan_where_a_parameter_gets_no_gradient():
    assert through_torchopt(2).isnan().all()
    assert not through_torchopt(2, eps_root=1e-16).isnan().any()


def test_torchopts_accelerated_adam_is_off():
    """By nearly two, on the first step."""
    ratio = through_torchopt(1, use_accelerated_op=True) / truth(1)
    assert ratio.min() > 1.5


def test_highers_adam_is_an_older_one():
    """It adds eps before it corrects the second moment, so its steps are not those of torch.optim.Adam."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(PARAMS["x"].clone())

        def forward(self, a):
            return inner({"x": self.x, "unused": torch.zeros(1)}, {"a": a})

    network, a = Network(), HPARAMS["a"].clone().requires_grad_()
    with higher.innerloop_ctx(network, torch.optim.Adam(network.parameters(), **OPTIONS)) as (fast, differentiable):
        for _ in range(2):
            differentiable.step(fast(a))
        (found,) = torch.autograd.grad(outer({"x": fast.x, "unused": torch.zeros(1)}, {"a": a}), a)
    wanted = truth(2)
    assert (found - wanted).norm() > 0.01 * wanted.norm()


@pytest.mark.filterwarnings("ignore")
def test_bettys_darts_is_after_the_step_and_without_the_learning_rate():
    pytest.importorskip("betty.engine", reason="declares Python below 3.11: pip install --ignore-requires-python")
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    logging.disable(logging.INFO)
    found = []

    class Upper(ImplicitProblem):
        def training_step(self, batch):
            return outer({"x": self.lower.module["x"], "unused": torch.zeros(1)}, {"a": self.module["a"]})

        def custom_optimizer_step(self):
            found.append(self.module["a"].grad.clone())

    class Lower(ImplicitProblem):
        def training_step(self, batch):
            return inner({"x": self.module["x"], "unused": torch.zeros(1)}, {"a": self.upper.module["a"]})

    def problem(kind, name, tensors, lr):
        module = torch.nn.ParameterDict({n: t.clone() for n, t in tensors.items()})
        optimiser = torch.optim.SGD(module.parameters(), lr=lr)
        config = Config(type="darts", darts_alpha=1e-4, unroll_steps=1)
        batches = [(torch.zeros(1),)] * 10
        return kind(name=name, module=module, optimizer=optimiser, config=config, train_data_loader=batches)

    upper, lower = problem(Upper, "upper", HPARAMS, 0.0), problem(Lower, "lower", {"x": PARAMS["x"]}, 0.05)
    links = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    Engine(config=EngineConfig(train_iters=1, logger_type="none"), problems=[upper, lower], dependencies=links).run()
    logging.disable(logging.NOTSET)

    given = inner, outer, PARAMS, HPARAMS, sgd(0.05), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        after, before = hypergradient(*given, "neumann", terms=1, lr=1.0), hypergradient(*given)
    assert torch.allclose(found[0], after.hypergradient["a"], rtol=1e-4)
    assert not torch.allclose(found[0], before.hypergradient["a"], rtol=0.1)
