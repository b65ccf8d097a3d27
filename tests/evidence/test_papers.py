import shutil

import pytest

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import papers


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the papers' files that a test may spoil."""
    shutil.copytree(paths.PACKAGE / "evidence" / "papers", tmp_path / "evidence" / "papers")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    return tmp_path / "evidence" / "papers" / "learn2synth.yaml"


def test_every_number_has_a_source_a_reader_can_look_up():
    for chapter in papers.chapters(paths.PACKAGE / "evidence" / "papers"):
        paper = papers.paper(chapter)
        for table in paper.tables:
            source = paper.source(table)
            assert paper.arxiv in source or "repository" in source, table.id
            assert table.where in source


def test_means_over_checkpoints_are_the_means_of_the_checkpoints_beside_them():
    for name in ("sigma", "sigma_range"):
        table = papers.table("learn2synth", name)
        for column, digits in zip(table.columns, [3 if c == "dice" else 4 for c in table.columns], strict=True):
            five = [table.value(f"checkpoint {number}", column) for number in range(1, 6)]
            assert table.value("mean of five checkpoints", column) == pytest.approx(
                sum(five) / 5, abs=0.5 * 10**-digits
            )


def test_the_summary_rounds_what_the_repository_has_and_drops_the_sign():
    summary, repository = papers.table("learn2synth", "sigma_summary"), papers.table("learn2synth", "sigma")
    for preset in summary.columns:
        exact = repository.value("mean of five checkpoints", preset)
        assert abs(summary.value("learned sigma", preset) - abs(exact)) <= 0.0005
    assert repository.value("mean of five checkpoints", "0") < 0
    assert any("sign" in note for note in summary.notes("learned sigma", "0"))


def test_where_sources_contradict_the_value_says_so():
    main, variants = papers.table("learn2synth", "in_domain"), papers.table("learn2synth", "in_domain_variants")
    ours = "Learn2Synth (nonparametric)"
    assert main.value(ours, "OASIS3") < main.value("supervised UNet", "OASIS3")
    assert any("0.881 is below 0.899" in note for note in main.notes(ours, "OASIS3"))
    fixed, varying = (f"Learn2Synth nonparametric, {how} sigma" for how in ("fixed", "varying"))
    assert variants.value(fixed, "ABIDE") == main.value(ours, "ABIDE") != variants.value(varying, "ABIDE")
    assert variants.value(varying, "OASIS3") == main.value(ours, "OASIS3") != variants.value(fixed, "OASIS3")
    assert all("no single configuration" in " ".join(main.notes(ours, cohort)) for cohort in main.columns)
    assert main.value("naive SynthSeg", "ABIDE") != variants.value("SynthSeg default", "ABIDE")
    assert main.notes("naive SynthSeg", "ABIDE")


def test_the_noise_matrix_is_read_with_models_as_columns():
    table = papers.table("learn2synth", "noise_matrix")
    assert "only the other way round" in table.note
    # A model trained without noise fails on noisy images; one trained with noise does not fail on clean ones.
    assert table.value("0.15", "Learn2Synth noise-free") < 0.1 < 0.8 < table.value("0", "Learn2Synth 0.15")


def test_the_authors_exponents_miss_their_presets():
    table = papers.table("learn2synth", "exponents")
    worst = max(abs(table.value(f"1/0/0, noise {noise}", "low") - 1) for noise in ("0.05", "0.10", "0.15"))
    assert worst > 0.8
    assert table.value(".8/.8/.8, noise 0.10", "mid") < 0.6


def test_what_is_not_tested_has_a_reason():
    what = {item.what: item.why for item in papers.paper("learn2synth").not_tested}
    assert "SAMSEG" in what
    assert any("ABIDE" in name and "OASIS3" in name for name in what)
    assert all(len(why.split()) >= 3 for why in what.values())


def test_values_are_printed_with_the_digits_of_their_source():
    table = papers.table("learn2synth", "exponents")
    row = ".5/.5/.5, noise 0.05"
    assert (table.text(row, "mid"), table.text(row, "dice")) == ("0.4310", "0.8992")
    assert (
        papers.table("learn2synth", "in_domain_variants").text("Learn2Synth parametric, fixed sigma", "OASIS3")
        == "0.860"
    )
    assert papers.table("learn2synth", "learning_rates").text("outcome", "0.005") == "fails"
    assert table.text("no such row", "mid") == "–"


@pytest.mark.parametrize(
    ("find", "put", "sentence"),
    [
        ("[0.908, 0.899]", "[0.908]", "row 'supervised UNet' has 1 values for 2 columns"),
        ("[0.908, 0.899]", "[0.908, true]", "wrong at tables.0.rows.supervised UNet"),
        ("venue:", "venu:", "wrong at venue: Field required"),
        ("source: summary", "source: hearsay", "table 'in_domain' names source 'hearsay'"),
        ("- row: naive SynthSeg", "- row: naive", "a mark names ('naive', None)"),
        ("id: sigma_summary", "id: in_domain", "table 'in_domain' stands twice"),
        ("title:", "title: [", "no valid YAML"),
    ],
)
def test_a_faulty_file_is_one_sentence_with_file_and_place(house, find, put, sentence):
    text = house.read_text()
    assert find in text
    house.write_text(text.replace(find, put, 1))
    with pytest.raises(UserError) as error:
        papers.paper("learn2synth")
    assert sentence in str(error.value)
    assert "learn2synth.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_chapter_or_table_names_those_there_are():
    with pytest.raises(UserError, match=r"nobody\.yaml.*learn2synth"):
        papers.paper("nobody")
    with pytest.raises(UserError, match=r"no table 'dice'.*in_domain"):
        papers.table("learn2synth", "dice")
