r"""SynthFM: training SAM's mask decoder on shapes drawn by code, to segment medical images it has never seen.

Sengupta et al., SynthFM: Training Modality-agnostic Foundation Models for Medical Image Segmentation without Real
Medical Data, ISBI 2025, arXiv 2504.08177. SAM's image encoder stays frozen; its mask decoder begins anew and learns
from synthetic images alone; the result is prompted with points in CT, MR and ultrasound. No code was released, and the
ranges of the generator are not public.
"""

from synthrepro.evidence import Experiment
from synthrepro.methods.synthfm.arms import ARMS, RANGES, Arm, ArmSettings, draw_images, drawn, train_decoder, trained
from synthrepro.methods.synthfm.experiments import (
    Block,
    Table,
    answers_of,
    prompts_of,
    shown,
    table_cells,
    table_run,
    table_steps,
)
from synthrepro.methods.synthfm.segmenting import Prompt, TrainSettings, answer, loss_of, small, train
from synthrepro.methods.synthfm.starts import Prompting, SamSettings, natural, start, start_spec, train_promptable
from synthrepro.methods.synthfm.structures import Structures, few, rows_of_subjects, structures_of

__all__ = [
    "ARMS",
    "EXPERIMENTS",
    "RANGES",
    "Arm",
    "ArmSettings",
    "Block",
    "Prompt",
    "Prompting",
    "SamSettings",
    "Structures",
    "Table",
    "TrainSettings",
    "answer",
    "answers_of",
    "draw_images",
    "drawn",
    "few",
    "loss_of",
    "natural",
    "prompts_of",
    "rows_of_subjects",
    "shown",
    "small",
    "start",
    "start_spec",
    "structures_of",
    "table_cells",
    "table_run",
    "table_steps",
    "train",
    "train_decoder",
    "train_promptable",
    "trained",
]

EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "zero_shot",
            "Dice by prompt, on structures and modalities that were never trained on",
            Table,
            table_cells,
            table_run,
            table_steps,
            {"promptable": train_promptable, "images": draw_images, "decoder": train_decoder},
            across_tasks=True,
        ),
        Experiment(
            "modules",
            "What each of the two modules brings, by modality",
            Table,
            table_cells,
            table_run,
            table_steps,
            {"promptable": train_promptable, "images": draw_images, "decoder": train_decoder},
            across_tasks=True,
        ),
        Experiment(
            "encoder",
            "What is trained, by which loss: encoder, prompt encoder, decoder",
            Table,
            table_cells,
            table_run,
            table_steps,
            {"promptable": train_promptable, "images": draw_images, "decoder": train_decoder},
            across_tasks=True,
        ),
        Experiment(
            "ranges",
            "The generator's ranges halved and doubled",
            Table,
            table_cells,
            table_run,
            table_steps,
            {"promptable": train_promptable, "images": draw_images, "decoder": train_decoder},
            across_tasks=True,
        ),
        Experiment(
            "boxes",
            "Boxes and masks as prompts",
            Table,
            table_cells,
            table_run,
            table_steps,
            {"promptable": train_promptable, "images": draw_images, "decoder": train_decoder},
            across_tasks=True,
        ),
    )
}
