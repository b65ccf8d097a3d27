r"""GenSeg: searching a mask-to-image GAN's architecture so that what it paints helps a segmenter with few labels.

Zhang, Jindal, Alaa, Weinreb, Wilson, Segal, Zou and Xie, Generative AI enables medical image segmentation in ultra
low-data regimes, Nature Communications 16:6486 (2025), arXiv 2408.17421. Three nested problems:

.. math::

    \min_A L_\text{seg}(S^*, D_\text{val}) \quad \text{where} \quad
    S^* = \arg\min_S L_\text{seg}\bigl(S, D_\text{train} \cup \gamma\, G^*_A(\tilde m)\bigr), \quad
    G^* = \arg\min_G \max_H L_\text{GAN}(G, A, H) .

The released 2-D scripts solve another problem: they detach the generated image, so that nothing passes from the
segmenter to the generator, hand the architecture A to no optimiser, and train the segmenter on validation images
besides. Arm "as-coded" does the same (:func:`train_jointly` says what it leaves out), arm "genseg" what the paper says.
"""

from synthrepro.evidence import Experiment
from synthrepro.methods.genseg.algorithm import (
    Batch,
    Gan,
    GanSettings,
    Settings,
    discriminator_step,
    encode,
    gan_losses,
    genseg_levels,
    genseg_step,
    paint,
    plain_step,
    pretrain,
    repeatable,
    segmentation_loss,
    train_jointly,
)
from synthrepro.methods.genseg.arms import (
    ARMS,
    Arm,
    ArmSettings,
    Pool,
    gan_for,
    labelled,
    scored,
    segmenter_for,
    task_of,
    train_arm,
    train_gan,
    train_segmenter,
    trained,
)
from synthrepro.methods.genseg.experiments import (
    EndToEnd,
    Gamma,
    Generated,
    LabelEfficiency,
    Main,
    Search,
    end_to_end_cells,
    end_to_end_run,
    gamma_cells,
    gamma_run,
    generated_cells,
    generated_run,
    label_efficiency_cells,
    label_efficiency_run,
    main_cells,
    main_run,
    search_cells,
    search_run,
)

__all__ = [
    "ARMS",
    "EXPERIMENTS",
    "Arm",
    "ArmSettings",
    "Batch",
    "EndToEnd",
    "Gamma",
    "Gan",
    "GanSettings",
    "Generated",
    "LabelEfficiency",
    "Main",
    "Pool",
    "Search",
    "Settings",
    "discriminator_step",
    "encode",
    "gan_for",
    "gan_losses",
    "generated_run",
    "genseg_levels",
    "genseg_step",
    "labelled",
    "paint",
    "plain_step",
    "pretrain",
    "repeatable",
    "scored",
    "segmentation_loss",
    "segmenter_for",
    "task_of",
    "train_arm",
    "train_gan",
    "train_jointly",
    "train_segmenter",
    "trained",
]

EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "main",
            "Jaccard and Dice of every arm, in domain and out of it",
            Main,
            main_cells,
            main_run,
            lambda cell, config: config.steps,
            {"gan": train_gan, "arm": train_arm},
        ),
        Experiment(
            "label_efficiency",
            "Jaccard by the number of labelled images",
            LabelEfficiency,
            label_efficiency_cells,
            label_efficiency_run,
            lambda cell, config: config.steps,
            {"gan": train_gan, "arm": train_arm},
        ),
        Experiment(
            "end_to_end",
            "Separate, joint as written, and joint as released",
            EndToEnd,
            end_to_end_cells,
            end_to_end_run,
            lambda cell, config: config.steps,
            {"gan": train_gan, "arm": train_arm},
        ),
        Experiment(
            "search",
            "What the search of the architecture adds",
            Search,
            search_cells,
            search_run,
            lambda cell, config: config.steps,
            {"gan": train_gan, "arm": train_arm},
        ),
        Experiment(
            "gamma",
            "The weight of the generated pairs",
            Gamma,
            gamma_cells,
            gamma_run,
            lambda cell, config: config.steps,
            {"gan": train_gan, "arm": train_arm},
        ),
        Experiment(
            "generated",
            "What the generator paints into unseen masks, as it trains",
            Generated,
            generated_cells,
            generated_run,
            lambda cell, config: config.pretrain_steps + config.steps,
        ),
    )
}
