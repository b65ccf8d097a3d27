"""A cell that is never measured would leave a claim "not tested" and a table full of dashes, without an error."""

from collections import Counter
from itertools import product

import pytest

from synthrepro.data import abdomen, abdomen_ct, brain_oasis, breast_us, hippocampus
from synthrepro.evidence import claims, verdicts
from synthrepro.evidence.profiles import load_profile
from synthrepro.methods import synthfm

LOADED = claims.load_claims("synthfm")


def planned(profile, experiment):
    """Cell without its seed, as a set of fields -> seeds that the profile measures."""
    configuration = load_profile("synthfm", profile)[experiment]
    cells = synthfm.EXPERIMENTS[experiment].cells(configuration)
    return Counter(frozenset({"method": c.method, "task": c.task, **c.setting}.items()) for c in cells)


def seeds_of(fields, cells):
    """Seeds of the only cell that agrees with the fields."""
    (seeds,) = [count for cell, count in cells.items() if fields.items() <= dict(cell).items()]
    return seeds


@pytest.mark.parametrize("profile", ["cpu", "gpu", "paper"])
def test_every_claim_is_measured_with_enough_seeds_on_every_task_that_it_names(profile):
    for claim in (claim for claim in LOADED.claims if claim.kind):
        if (profile == "paper") != (claim.where["model"] == "vit_h"):
            continue
        cells = planned(profile, claim.experiment)
        for task, *values in product(claim.tasks, *(claims._levels(claim.where, name) for name in claim.by)):
            for arm in claims._arms(claim, dict(zip(claim.by, values, strict=True))):
                assert arm.pop("split") == "test"
                assert seeds_of({"task": task, **arm}, cells) >= verdicts.SEEDS, claim.id


@pytest.mark.parametrize("profile", ["cpu", "gpu", "paper"])
def test_every_row_of_a_table_is_measured(profile):
    assert set(LOADED.tables) == set(synthfm.EXPERIMENTS)
    for experiment, specs in LOADED.tables.items():
        cells = planned(profile, experiment)
        for spec in specs:
            if (profile == "paper") == (spec.where["model"] == "vit_h"):
                for values in product(*spec.rows.values()):
                    row = {**spec.where, **dict(zip(spec.rows, values, strict=True))}
                    assert seeds_of(row, cells) >= verdicts.SEEDS, spec.id


def test_tables_of_structures_have_each_of_the_tasks_classes_and_no_other():
    specs = {spec.id: spec for spec in LOADED.tables["zero_shot"]}
    for module in (abdomen, abdomen_ct, breast_us, hippocampus, brain_oasis):
        name = module.__name__.rpartition(".")[2]
        _, *columns = (column.metric for column in specs[f"structures_{name}"].metrics)  # the first is the disc's
        assert set(columns) == {f"dice_{structure.lower()}" for structure in module.CLASSES[1:]}


def test_claims_that_name_sam_need_its_weights():
    for claim in (claim for claim in LOADED.claims if claim.kind):
        assert ("SAM" in claim.title) == (claim.where["model"] != "promptable"), claim.id
