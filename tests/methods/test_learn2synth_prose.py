"""What the chapter says in words about its tables is what the tables say. New evidence may end a sentence here."""

from functools import cache

import pytest

from synthrepro.evidence.tables import tables

REAL = ("supervised", "supervised-augmented", "mixed", "fine-tuned", "advchain")  # arms that step on real images
PAINTED = (
    "learn2synth-nonparametric", "learn2synth-parametric", "learn2synth-range", "learn2synth-varying", "synthseg",
    "synthseg-plain", "synthseg-searched",
)  # fmt: skip
LOW, HIGH = ("FLASH 3", "FLASH 5"), ("FLASH 20", "FLASH 30")


@cache
def means(experiment: str, ids: tuple[str, ...], subjects: str = "all") -> dict[str, dict[str, float]]:
    """Method -> column -> mean over seeds, over the tables named; with people, those trained on so many or on none."""
    found: dict[str, dict[str, float]] = {}
    for table in tables("learn2synth", experiment):
        if table.id not in ids:
            continue
        for row in table.rows:
            if row.fields.get("subjects", subjects) not in (subjects, "none"):
                continue
            values = zip(table.columns, row.values, strict=True)
            known = {column.label: value.mean for column, value in values if value.mean is not None}
            found.setdefault(row.fields["method"], {}).update(known)
    return found


def across(task: str = "") -> dict[str, dict[str, float]]:
    return means("cross_contrast", tuple(f"cross_contrast{part}{task}" for part in ("", "_others", "_none")))


def test_in_domain_on_people():
    dice = {method: row["all"] for method, row in means("in_domain", ("in_domain",)).items()}
    assert max(dice, key=lambda method: dice[method]) == "advchain"
    assert dice["fine-tuned"] == max(dice[m] for m in REAL if m != "advchain")
    assert min(dice[m] for m in REAL) > max(dice[m] for m in PAINTED if m in dice)
    assert abs(dice["atlas-mixture"] - dice["supervised"]) < 0.02
    for method in ("learn2synth-nonparametric", "learn2synth-parametric"):
        assert dice[method] < dice["synthseg-plain"]


def test_low_flip_angles_reverse_the_order():
    dice = across()
    for angle in LOW:
        assert dice["learn2synth-nonparametric"][angle] > dice["synthseg-plain"][angle] > dice["supervised"][angle]
        for method in ("advchain", "fine-tuned", "mixed"):
            assert dice[method][angle] < dice["learn2synth-nonparametric"][angle]
        assert dice["mixed"][angle] > max(dice[m][angle] for m in ("advchain", "fine-tuned", "supervised"))
    for angle in HIGH:
        assert dice["supervised"][angle] > dice["learn2synth-nonparametric"][angle]
        assert dice["synthseg-plain"][angle] > dice["learn2synth-nonparametric"][angle]


def test_intensity_curves_hold_up_as_well_as_synthesis():
    dice = across()
    for angle in (*LOW, *HIGH, "T1"):
        painted = max(dice[m][angle] for m in ("learn2synth-nonparametric", "learn2synth-parametric", "synthseg-plain"))
        assert dice["supervised-augmented"][angle] > painted - 0.005, angle
    assert dice["supervised"]["T1"] - dice["supervised-augmented"]["T1"] > 0.05


@pytest.mark.parametrize("task", ["", "_mni"])
def test_no_contrast_is_foreign_to_the_atlas(task):
    dice = across(task)
    networks = [m for m in dice if m != "atlas-mixture"]
    for angle in LOW:
        assert dice["atlas-mixture"][angle] > max(dice[m][angle] for m in networks)
    for angle in HIGH:
        ahead = [m for m in networks if dice[m][angle] > dice["atlas-mixture"][angle]]
        assert len(ahead) <= 2, ahead


def test_people():
    few, everyone = (
        means("cross_contrast", ("cross_contrast",), subjects)["learn2synth-nonparametric"] for subjects in ("5", "all")
    )
    assert all(abs(few[angle] - everyone[angle]) < 0.01 for angle in everyone)
