import math
from pathlib import Path

import pytest
import torch

from synthrepro.bilevel import Step
from synthrepro.data import load_task
from synthrepro.evidence import Cell, Context, load_profile
from synthrepro.methods import learn2synth as l2s
from synthrepro.models import unet
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, LabelsToImage, Nonparametric, Parametric
from synthrepro.training import LOSSES, seeded, stream

ANATOMY = {"size": (32, 32), "spacing": 6.0, "subjects": (4, 1, 2), "slices": 2}
SETTINGS = {
    "steps": 4, "batch": 2, "features": (4, 8), "norm": "instance", "loss": "dice", "update": "adam",
    "lr": 2e-3, "hyper_lr": 2e-2, "every": 1, "alpha": 1.0, "estimator": "exact",
}  # fmt: skip
RECOVERY = l2s.NoiseRecovery(
    **SETTINGS, anatomy=ANATOMY, bias_noise="0.05", noises=("0.10", "0.025-0.2"), exponents=(".5/.5/.5",), seeds=2
)


@pytest.fixture
def labels() -> torch.Tensor:
    coarse = torch.randint(4, (2, 1, 4, 4), generator=stream(0, "labels")).float()
    return torch.nn.functional.interpolate(coarse, (16, 16))[:, 0].long()


def batches(labels: torch.Tensor) -> tuple[l2s.Pairs, l2s.Pairs]:
    synthesis = LabelsToImage.learn2synth(4)
    return (lambda i: synthesis(labels, stream(i, "synthetic"))), (lambda i: synthesis(labels, stream(i, "real")))


AUGMENTERS = {
    "noise": lambda: GaussianNoise("fixed", 0.1),
    "range": lambda: GaussianNoise("range", (0.05, 0.2)),
    "parametric": lambda: Parametric(IntensityNonUniformity(exponents=(0.4, 0.5, 0.6)), GaussianNoise("fixed", 0.1)),
    "nonparametric": lambda: Nonparametric(stream(0, "weights")),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("augmenter", AUGMENTERS)
def test_the_hypergradient_is_the_derivative_of_the_whole_step(augmenter: str, loss: str, labels: torch.Tensor) -> None:
    settings = l2s.Settings(**(SETTINGS | {"loss": loss, "update": "sgd", "lr": 0.05}))
    network = unet(1, 4, (4, 8)).double()
    module = AUGMENTERS[augmenter]().double()
    phi = {n: p.detach() for n, p in network.named_parameters()}
    theta = {n: p.detach() for n, p in module.named_parameters()}
    synthetic, real = ((x.double(), y) for x, y in (pairs(0) for pairs in batches(labels)))
    draw = module.draw(synthetic[0], stream(0, "draw"))
    direction = {n: torch.randn(p.shape, generator=stream(1, n), dtype=p.dtype) for n, p in theta.items()}

    def step(size: float) -> Step:
        moved = {n: p + size * direction[n] for n, p in theta.items()}
        return l2s.learn2synth_step(network, module, phi, moved, (*synthetic, draw), real, settings, None)

    h = 1e-6
    numeric = (step(h).outer_loss - step(-h).outer_loss) / (2 * h)
    found = step(0.0).hypergradient
    along = sum((found[n] * direction[n]).sum() for n in theta)
    assert abs(numeric) > 1e-9
    assert torch.isclose(along, numeric, rtol=1e-4), along / numeric - 1  # ELU has a kink in its slope


def test_the_segmentation_network_never_steps_on_a_real_image(labels: torch.Tensor, tmp_path: Path) -> None:
    """With the augmenter held still, other real images and another weight of their loss leave no trace."""
    synthetic, real = batches(labels)

    def trained(name: str, real: l2s.Pairs, alpha: float, hyper_lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        settings = l2s.Settings(**(SETTINGS | {"alpha": alpha, "hyper_lr": hyper_lr}))
        network = seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network"))
        augmenter = GaussianNoise("fixed", 0.1)
        l2s.learn2synth(network, augmenter, synthetic, real, settings, 0, Context(tmp_path / name))
        return torch.cat([p.detach().flatten() for p in network.parameters()]), augmenter.sigma.detach()

    def elsewhere(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = real(i + 1000)
        return 1 - x, (y + 1) % 4

    still, sigma = trained("still", real, 1.0, 0.0)
    assert sigma == torch.tensor(0.1)
    assert torch.equal(still, trained("elsewhere", elsewhere, 7.0, 0.0)[0])
    # and once the augmenter may move, the real images do speak, through it
    moved, sigma = trained("moved", real, 1.0, 0.02)
    assert sigma != torch.tensor(0.1)
    assert not torch.equal(still, moved)


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_a_plain_step_is_the_step_without_its_hypergradient(update: str, labels: torch.Tensor) -> None:
    settings = l2s.Settings(**(SETTINGS | {"update": update}))
    network, augmenter = unet(1, 4, (4, 8)), GaussianNoise("fixed", 0.1)
    phi, theta = ({n: p.detach() for n, p in m.named_parameters()} for m in (network, augmenter))
    synthetic, real = (pairs(0) for pairs in batches(labels))
    inner = (*synthetic, augmenter.draw(synthetic[0], stream(0, "draw")))
    whole = l2s.learn2synth_step(network, augmenter, phi, theta, inner, real, settings, None)
    plain, state = l2s.plain_step(network, augmenter, phi, inner, settings, None)
    assert all(torch.equal(plain[n], whole.params[n]) for n in phi)
    assert state["step"] == whole.state["step"] == 1


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_a_killed_training_goes_on_where_it_was(
    update: str, every: int, labels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "checkpoint_due", lambda self: True)
    synthetic, real = batches(labels)
    settings = l2s.Settings(**(SETTINGS | {"update": update, "every": every, "steps": 6}))

    def train(folder: str, real: l2s.Pairs) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        network = seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network"))
        trail = l2s.learn2synth(
            network, GaussianNoise("fixed", 0.3), synthetic, real, settings, 0, Context(tmp_path / folder)
        )
        return trail, network.state_dict()

    def killed(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if i >= 3:
            raise KeyboardInterrupt
        return real(i)

    with pytest.raises(KeyboardInterrupt):
        train("killed", killed)
    resumed, whole = train("killed", real), train("whole", real)
    assert resumed[0] == whole[0]
    assert all(torch.equal(resumed[1][n], whole[1][n]) for n in whole[1])


def test_plain_training_goes_on_where_it_was_too(
    labels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "checkpoint_due", lambda self: True)
    synthetic, _ = batches(labels)
    weights = []
    for folder, stop in (("a", 2), ("a", 4), ("b", 4)):
        network = seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network"))
        settings = l2s.Settings(**(SETTINGS | {"steps": stop}))
        l2s.fit(network, synthetic, settings, 0, Context(tmp_path / folder))
        weights.append(network.state_dict())
    assert all(torch.equal(weights[1][n], weights[2][n]) for n in weights[1])


def test_a_target_has_the_noise_and_the_field_of_its_preset() -> None:
    x = torch.full((64, 1, 16, 16), 0.5)
    noisy = l2s.degrader("0.05").requires_grad_(False)
    assert (noisy(x, noisy.draw(x, stream(0, "a"))) - x).std() == pytest.approx(0.05, rel=0.02)
    ranged = l2s.degrader("0.025-0.2").requires_grad_(False)
    levels = (ranged(x, ranged.draw(x, stream(0, "a"))) - x).flatten(1).std(1)
    assert 0.02 < levels.min() < 0.05
    assert 0.17 < levels.max() < 0.22
    low = l2s.degrader("0", "1/0/0").requires_grad_(False)
    draw = low.draw(x, stream(0, "a"))
    assert torch.allclose(low(x, draw), x * draw.field.log_fields[:, :1].exp(), rtol=1e-4)


def test_halves_share_no_individual_and_a_seed_redraws_them() -> None:
    task = load_task("brain-mni", **ANATOMY)
    synthesis = l2s.generator(task, l2s.Anatomy(**ANATOMY))
    halves = [l2s.Halves(task, synthesis, 2, seed, torch.device("cpu")) for seed in range(4)]
    train = task.splits["train"]
    for half in halves:
        assert len(half.real) == len(half.labels) == len(train) // 2
        mine = {m.numpy().tobytes() for m in half.real_labels}
        assert mine.isdisjoint({m.numpy().tobytes() for m in half.labels})
    assert len({half.real.individuals for half in halves}) > 1


@pytest.mark.parametrize(
    "cell",
    [Cell("fixed", "brain-mni", 0, {"noise": "0.10"}), Cell("range", "brain-mni", 0, {"noise": "0.025-0.2"}),
     Cell("bias", "brain-mni", 1, {"exponents": "1/0/0", "start": "below"})],
    ids=lambda cell: cell.method,
)  # fmt: skip
def test_every_kind_of_recovery_cell_runs_and_repeats(cell: Cell, tmp_path: Path) -> None:
    builders = l2s.EXPERIMENTS["noise_recovery"].artefacts
    result = l2s.noise_recovery_run(cell, RECOVERY, Context(tmp_path / "a", builders))
    assert result.metrics == l2s.noise_recovery_run(cell, RECOVERY, Context(tmp_path / "b", builders)).metrics
    assert {"sigma", "preset", "sigma_error", "dice_real", "dice_trivial"} <= result.metrics.keys()
    assert [case["subject"] for case in result.cases] == list(load_task("brain-mni", **ANATOMY).splits["test"].subjects)
    if cell.method == "bias":
        assert math.isclose(
            result.metrics["exponent_error"],
            sum(abs(result.metrics[f"error_{name}"]) for name in ("low", "mid", "high")) / 3,
        )


def test_the_cells_of_noise_recovery_are_those_of_the_paper_in_order_of_priority() -> None:
    cells = l2s.noise_recovery_cells(RECOVERY)
    assert [(c.method, c.seed) for c in cells[:4]] == [("fixed", 0), ("fixed", 1), ("fixed", 0), ("fixed", 1)]
    assert [c.method for c in cells].count("range") == 2
    assert [c.method for c in cells].count("bias") == 4
    assert len({c.key for c in cells}) == len(cells)


def test_noise_matrix_tests_the_network_of_noise_recovery_at_every_noise(tmp_path: Path) -> None:
    lists = {"noises": ("0.10",), "seeds": 1}
    matrix = l2s.NoiseMatrix(
        **SETTINGS, anatomy=ANATOMY, bias_noise="0.05", test_noises=("0", "0.10", "0.025-0.2"), **lists
    )
    first, last = l2s.noise_matrix_cells(matrix)
    assert (first.method, last.method) == ("fixed", "synthseg")
    context = Context(tmp_path, l2s.EXPERIMENTS["noise_matrix"].artefacts)
    result = l2s.noise_matrix_run(first, matrix, context)
    recovered = l2s.noise_recovery_run(first, RECOVERY, context)
    assert len(context.artefacts) == 1  # trained once for both
    assert [c for c in result.cases if c["split"] == "noise-0.10"] == [
        c | {"split": "noise-0.10"} for c in recovered.cases
    ]
    assert {c["split"] for c in result.cases} == {"noise-0", "noise-0.10", "noise-0.025-0.2"}
    assert l2s.noise_matrix_run(last, matrix, context).metrics != result.metrics


@pytest.mark.parametrize("axis", ["noise", "split"])
def test_risk_profiles_score_one_network_on_every_target(axis: str, tmp_path: Path) -> None:
    config = l2s.RiskProfile(
        **SETTINGS, anatomy=ANATOMY, bias_noise="0.05", target_noises=("0", "0.10"), target_exponents=("1/0/0",),
        noises=("0.10",), strengths=(), splits=("0/0/1",), seeds=1,
    )  # fmt: skip
    (cell,) = (c for c in l2s.risk_profile_cells(config) if c.setting["axis"] == axis)
    metrics = l2s.risk_profile_run(cell, config, Context(tmp_path)).metrics
    assert set(metrics) == (
        {"risk 0", "risk 0.10", "dice 0", "dice 0.10"} if axis == "noise" else {"risk 1/0/0", "dice 1/0/0"}
    )


def test_moments_find_exponents_that_are_there(tmp_path: Path) -> None:
    """The estimator is right where the answer is easy: no noise, many images."""
    config = l2s.ExponentsFromImages(
        anatomy=ANATOMY | {"size": (64, 48), "spacing": 3.0}, bias_noise="0", images=256, exponents=(), seeds=1
    )
    cell = Cell("moments", "brain-mni", 0, {"exponents": ".8/.8/.8"})
    metrics = l2s.exponents_from_images_run(cell, config, Context(tmp_path)).metrics
    assert metrics["exponent_error"] < 0.15


def test_every_profile_lists_the_papers_presets_and_five_seeds() -> None:
    for profile in ("cpu", "gpu", "paper"):
        configs = load_profile("learn2synth", profile)
        noise, exponents = configs["noise_recovery"], configs["exponent_recovery"]
        assert noise.noises == ("0", "0.05", "0.09", "0.095", "0.10", "0.105", "0.11", "0.15", "0.025-0.2")
        assert exponents.exponents == (".5/.5/.5", ".8/.8/.8", ".2/.2/.2", "1/0/0")
        assert noise.seeds == exponents.seeds == 5


def test_no_profile_puts_an_exponent_out_of_the_augmenters_reach() -> None:
    """Adam moves a logit by its rate a step at most; the way between the starts must be half of that."""
    for profile in ("cpu", "gpu", "paper"):
        config = load_profile("learn2synth", profile)["exponent_recovery"]
        reach = config.hyper_lr * config.steps / config.every / 2  # the cosine halves it
        low, high = (torch.tensor(start).logit() for start in l2s.STARTS.values())
        assert high - low < reach / 2
