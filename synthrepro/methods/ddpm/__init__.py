r"""Label-efficient diffusion: pre-training a DDPM on unlabelled CT, and fine-tuning its decoder with few labels.

Huang et al., Label-efficient multi-organ segmentation with a diffusion model, arXiv 2402.15216. A UNet learns to
predict the noise in unlabelled slices; then, fed a clean slice and one fixed step t, with a new head, it segments
organs, and of it only the decoder and the head are trained. No code was released with the paper.
"""

from synthrepro.evidence import Experiment
from synthrepro.methods.ddpm.arms import (
    ARMS,
    RATIOS,
    Arm,
    ArmSettings,
    DdpmSettings,
    Size,
    ddpm_spec,
    fit,
    labelled,
    pretrained,
    scored,
    segmenter_for,
    task_of,
    train_arm,
    trivial,
    unet_for,
)
from synthrepro.methods.ddpm.ddpm_seg import DdpmSegSettings
from synthrepro.methods.ddpm.experiments import (
    Block,
    Generation,
    Table,
    generation_cells,
    generation_run,
    table_cells,
    table_run,
    task_of_unlabelled,
    train_extractor,
)
from synthrepro.methods.ddpm.finetuning import (
    labelled_slices,
    rows_of,
    segmentation_loss,
    train,
    volume_dice,
    volume_scores,
)
from synthrepro.methods.ddpm.pretraining import (
    PretrainSettings,
    UNetSettings,
    batch_of,
    diffuse,
    loss_of,
    pretrain,
    sample,
    scheduler_of,
    train_ddpm,
    unet_of,
)

__all__ = [
    "ARMS",
    "EXPERIMENTS",
    "RATIOS",
    "Arm",
    "ArmSettings",
    "Block",
    "DdpmSegSettings",
    "DdpmSettings",
    "Generation",
    "PretrainSettings",
    "Size",
    "Table",
    "UNetSettings",
    "batch_of",
    "ddpm_spec",
    "diffuse",
    "fit",
    "labelled",
    "labelled_slices",
    "loss_of",
    "pretrain",
    "pretrained",
    "rows_of",
    "sample",
    "scheduler_of",
    "scored",
    "segmentation_loss",
    "segmenter_for",
    "task_of",
    "task_of_unlabelled",
    "train",
    "train_arm",
    "train_ddpm",
    "trivial",
    "unet_for",
    "unet_of",
    "volume_dice",
    "volume_scores",
]

EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "label_ratio",
            "Dice by the share of the training slices that is labelled",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "strategies",
            "What is fine-tuned, and at which step t",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "full_data",
            "All methods with all labelled slices",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "organs",
            "Dice of each organ",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "controls",
            "What the gain is due to",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "seeds",
            "How far single runs scatter, and what scatters them",
            Table,
            table_cells,
            table_run,
            lambda cell, config: config.steps[cell.setting["ratio"]],
            {"ddpm": train_ddpm, "arm": train_arm},
        ),
        Experiment(
            "generation",
            "How good generated images are, as pre-training goes on",
            Generation,
            generation_cells,
            generation_run,
            lambda cell, config: config.pretrain[cell.task].steps,
            {"ddpm": train_ddpm, "extractor": train_extractor},
        ),
    )
}
