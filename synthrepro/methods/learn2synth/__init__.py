r"""Learn2Synth: learning how to augment synthetic images with hypergradients of the loss on real ones.

Hu, Zeng, Puonti, Iglesias, Fischl and Balbastre, ICCV 2025 (arXiv 2411.16719). A segmentation network
:math:`S_\phi` only ever trains on synthetic images that an augmenter :math:`A_\theta` has touched up; after each step
the loss on real images says how the augmenter should have done it:

.. math::

    \phi^* = U\bigl(\phi, \nabla_\phi L(S_\phi(A_\theta(x)), y)\bigr), \qquad
    \theta \leftarrow \theta - \eta\,\frac{d}{d\theta} L\bigl(S_{\phi^*}(x_\text{real}), y_\text{real}\bigr) .

What differs from the released code, and why, is in the chapter; in short: one set of random fields per image instead
of per batch, a decaying learning rate for the augmenter, aligned images and labels, and no residual ``+ x`` that would
double the image.
"""

from synthrepro.evidence import Experiment
from synthrepro.methods.learn2synth.algorithm import (
    Augmenter,
    Pairs,
    Settings,
    fit,
    inner_update,
    learn2synth,
    learn2synth_step,
    plain_step,
    scalars,
)
from synthrepro.methods.learn2synth.arms import (
    ARMS,
    Arm,
    ArmSettings,
    CrossContrast,
    InDomain,
    Pool,
    by_subject,
    cross_contrast_cells,
    cross_contrast_run,
    in_domain_cells,
    in_domain_run,
    search,
    task_of,
    train_arm,
)
from synthrepro.methods.learn2synth.cost import Cost, cost_cells, cost_run, saved_bytes, step_of
from synthrepro.methods.learn2synth.horizon import Horizon, horizon_cells, horizon_run, horizon_train, window
from synthrepro.methods.learn2synth.known import (
    STARTS,
    Anatomy,
    ExponentsFromImages,
    Halves,
    NoiseMatrix,
    NoiseRecovery,
    RiskProfile,
    degrader,
    exponent_values,
    exponents_from_images_cells,
    exponents_from_images_run,
    field_energies,
    generator,
    network_for,
    noise_level,
    noise_matrix_cells,
    noise_matrix_run,
    noise_recovery_cells,
    noise_recovery_run,
    risk_profile_cells,
    risk_profile_run,
    target_set,
    train_on_known,
    trivial_dice,
)
from synthrepro.methods.learn2synth.known_augmentation import (
    KnownAugmentation,
    known_augmentation_cells,
    known_augmentation_run,
)

__all__ = [
    "ARMS",
    "EXPERIMENTS",
    "STARTS",
    "Anatomy",
    "Arm",
    "ArmSettings",
    "Augmenter",
    "Cost",
    "CrossContrast",
    "ExponentsFromImages",
    "Halves",
    "Horizon",
    "InDomain",
    "KnownAugmentation",
    "NoiseMatrix",
    "NoiseRecovery",
    "Pairs",
    "Pool",
    "RiskProfile",
    "Settings",
    "by_subject",
    "cost_run",
    "cross_contrast_run",
    "degrader",
    "exponent_values",
    "exponents_from_images_run",
    "field_energies",
    "fit",
    "generator",
    "horizon_run",
    "horizon_train",
    "in_domain_run",
    "inner_update",
    "known_augmentation_run",
    "learn2synth",
    "learn2synth_step",
    "network_for",
    "noise_level",
    "noise_matrix_run",
    "noise_recovery_run",
    "plain_step",
    "risk_profile_run",
    "saved_bytes",
    "scalars",
    "search",
    "step_of",
    "target_set",
    "task_of",
    "train_arm",
    "train_on_known",
    "trivial_dice",
    "window",
]

EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "noise_recovery",
            "Is the noise of the real images found again?",
            NoiseRecovery,
            noise_recovery_cells,
            noise_recovery_run,
            lambda cell, config: config.steps,
            {"on_known": train_on_known},
        ),
        Experiment(  # the same, but logits of exponents have further to go than noise: another rate for the augmenter
            "exponent_recovery",
            "Is the field strength of the real images found again?",
            NoiseRecovery,
            noise_recovery_cells,
            noise_recovery_run,
            lambda cell, config: config.steps,
            {"on_known": train_on_known},
        ),
        Experiment(
            "noise_matrix",
            "Dice of networks trained at one noise and tested at another",
            NoiseMatrix,
            noise_matrix_cells,
            noise_matrix_run,
            lambda cell, config: config.steps,
            {"on_known": train_on_known},
        ),
        Experiment(
            "in_domain",
            "Dice on real images of the contrast that was trained on",
            InDomain,
            in_domain_cells,
            in_domain_run,
            lambda cell, config: config.steps,
            {"arm": train_arm},
        ),
        Experiment(
            "cross_contrast",
            "Dice on other contrasts than the one that was trained on",
            CrossContrast,
            cross_contrast_cells,
            cross_contrast_run,
            lambda cell, config: config.steps,
            {"arm": train_arm},
        ),
        Experiment(
            "known_augmentation",
            "The parametric against the nonparametric augmenter where the kind of augmentation is known",
            KnownAugmentation,
            known_augmentation_cells,
            known_augmentation_run,
            lambda cell, config: config.steps,
        ),
        Experiment(
            "horizon",
            "The noise that is learned by looking further than one step ahead",
            Horizon,
            horizon_cells,
            horizon_run,
            lambda cell, config: config.steps,
        ),
        Experiment(
            "cost",
            "What a step of every arm and estimator costs",
            Cost,
            cost_cells,
            cost_run,
            lambda cell, config: config.repeats,
        ),
        Experiment(
            "risk_profile",
            "How the risk on real images depends on the augmentation trained with",
            RiskProfile,
            risk_profile_cells,
            risk_profile_run,
            lambda cell, config: config.steps,
        ),
        Experiment(
            "exponents_from_images",
            "The same exponents, estimated from the images themselves",
            ExponentsFromImages,
            exponents_from_images_cells,
            exponents_from_images_run,
            lambda cell, config: 0,
        ),
    )
}
