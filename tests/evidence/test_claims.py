import json

import numpy as np
import pytest

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Provenance, Record, claims

PAPER = """
title: A toy
authors: A
venue: V
arxiv: "0"
code: none
sources: {paper: the paper}
tables:
  - {id: main, title: Main, source: paper, where: table 1, row: method, column: data, columns: [x], rows: {new: [0.9]}}
not_tested: []
"""
BASE = {"title": "T", "sentence": "S", "table": "main", "why": "W", "experiment": "trial", "tasks": ["phantom"]}
PRIMARY = {
    **BASE,
    "id": "first",
    "primary": True,
    "kind": "superiority",
    "margin": 0.1,
    "metric": "dice",
    "where": {"method": "new"},
    "against": {"method": "old"},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes claims of the chapter `toy` in a house of their own."""
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    for kind in ("papers", "claims"):
        (tmp_path / "evidence" / kind).mkdir(parents=True)
    (tmp_path / "evidence" / "papers" / "toy.yaml").write_text(PAPER)

    def write(*made, tiers=None, **more):
        content = {"tiers": tiers or {"phantom": "embedded", "brains": "real"}, "claims": list(made), **more}
        (tmp_path / "evidence" / "claims" / "toy.yaml").write_text(json.dumps(content))

    return write


def record(method, seed, value=None, *, task="phantom", profile="cpu", stale=False, started="1", config="0", **setting):
    """A record; `value` is its Dice, or its cases as {(split, subject): Dice}."""
    cases = value if isinstance(value, dict) else {}
    return Record(
        "toy",
        "trial",
        profile,
        Cell(method, task, seed, setting),
        {},
        config,
        {} if cases else {"dice": value, "target": 0.5},
        [{"split": split, "subject": subject, "dice": dice} for (split, subject), dice in cases.items()],
        [],
        Provenance(None, None, "", {}, "3", None, None, "CPU", 1.0, 1.0, started),
        stale,
    )


def arm(method, mean, seeds=5, **more):
    """Records of an arm whose seeds scatter by 0.01 around exactly this mean, in their own way for every arm."""
    scatter = np.random.default_rng([*method.encode(), int(1000 * mean)]).normal(0, 0.01, seeds)
    scatter -= scatter.mean()
    return [record(method, seed, mean + scatter[seed], **more) for seed in range(seeds)]


def judge(*found):
    return {one.claim.id: one for one in claims.judge("toy", lambda chapter, experiment: [*found])}


def test_the_repositorys_own_claims_are_well_formed_and_commit_to_one_primary_claim():
    loaded = claims.load_claims("learn2synth")
    (primary,) = [claim for claim in loaded.claims if claim.primary]
    assert (primary.kind, primary.margin, primary.experiment) == ("equivalence", 0.01, "noise_recovery")
    assert len(primary.where["noise"]) == 8
    assert all(claim.why for claim in loaded.claims if claim.kind)
    assert {"better-than-samseg", "cohorts"} <= {claim.id for claim in loaded.claims if claim.not_tested}


@pytest.mark.parametrize(
    ("new", "task", "word"),
    [
        (0.9, "phantom", "holds here"),
        (0.5, "phantom", "does not hold here"),
        (0.601, "phantom", "undecided here"),
        (0.9, "brains", "reproduced"),
        (0.5, "brains", "contradicted"),
        (0.601, "brains", "inconclusive"),
    ],
)
def test_the_word_follows_from_the_interval_and_the_tier(write, new, task, word):
    write(PRIMARY | {"tasks": ["brains", "phantom"]})
    one = judge(*arm("new", new, task=task), *arm("old", 0.5, task=task))["first"]
    assert (one.verdict, one.task, one.profile, one.seeds) == (word, task, "cpu", 5)
    part = one.deciding
    assert part.low < new - 0.5 < part.high
    assert 0 < part.smallest < 0.05


@pytest.mark.parametrize("new", [0.9, 0.3])
def test_networks_that_are_still_learning_decide_nothing_either_way(write, new):
    settled = {"where": {"method": "plain"}, "metric": "dice - target", "within": 0.02}  # targets are 0.5
    write(PRIMARY | {"settled": settled, "tasks": ["brains"]})
    compared = [*arm("new", new, task="brains"), *arm("old", 0.5, task="brains")]
    early = judge(*compared, *arm("plain", 0.53, task="brains"))["first"]
    assert early.verdict == "inconclusive"
    assert early.reason == "too early: plain still gains 0.030 (dice - target), more than 0.02"
    assert "could have seen" not in claims.render("md", [early])
    assert "| – | inconclusive; too early" in claims.render("md", [early])
    assert judge(*compared)["first"].reason.startswith("too early to tell: plain is not measured")
    done = judge(*compared, *arm("plain", 0.51, task="brains"))["first"]
    assert done.verdict == ("reproduced" if new > 0.5 else "contradicted")
    assert done.reason == ""


def test_an_undecided_claim_says_what_it_could_have_seen(write):
    write(PRIMARY)
    found = claims.judge("toy", lambda *_: [*arm("new", 0.601), *arm("old", 0.5)])
    assert f"undecided here (could have seen {found[0].deciding.smallest:.2g} from the margin)" in claims.render(
        "md", found
    )


def test_no_verdict_on_four_seeds_on_smoke_or_on_stale_records(write):
    write(PRIMARY)
    one = judge(*arm("new", 0.9), *arm("old", 0.5, seeds=4))["first"]
    assert (one.verdict, one.reason) == ("not tested", "phantom, cpu: 4 of 5 seeds of method old")
    one = judge(*arm("new", 0.9, profile="smoke"), *arm("old", 0.5, profile="smoke"))["first"]
    assert (one.verdict, one.reason) == ("not tested", "experiment trial has only smoke records")
    one = judge(*arm("new", 0.9), *arm("old", 0.5, stale=True))["first"]
    assert (one.verdict, one.reason) == ("not tested", "phantom, cpu: 0 of 5 seeds of method old (left out: 5 stale)")
    one = judge()["first"]
    assert (one.verdict, one.reason) == ("not tested", "experiment trial has no records yet")
    shifted = [record("old", seed + 1, 0.5) for seed in range(5)]
    assert "4 of 5 seeds that all arms share" in judge(*arm("new", 0.9), *shifted)["first"].reason


def test_a_verdict_says_which_records_it_left_out(write):
    write(PRIMARY)
    old = [record("old", seed, 0.5, config="before", started="0") for seed in range(5)]
    stale = [record("old", seed, 0.5, stale=True) for seed in range(2)]
    one = judge(*arm("new", 0.9), *arm("old", 0.5), *old, *stale)["first"]
    assert (one.verdict, one.reason) == ("holds here", "left out: 2 stale and 5 of an earlier configuration")


def test_the_strongest_evidence_that_is_complete_decides(write):
    write(PRIMARY | {"tasks": ["brains", "phantom"]})
    weak = [*arm("new", 0.9), *arm("old", 0.5)]
    strong = [*arm("new", 0.5, profile="gpu"), *arm("old", 0.5, profile="gpu")]
    assert judge(*weak, *strong)["first"].profile == "gpu"
    assert judge(*weak, *strong[1:])["first"].profile == "cpu"
    real = [*arm("new", 0.5, task="brains"), *arm("old", 0.5, task="brains")]
    assert judge(*weak, *strong, *real)["first"].verdict == "contradicted"


def test_a_claim_over_several_presets_needs_every_one_of_them(write):
    presets = {
        "where": {"method": "new", "noise": ["0.1", "0.2"]},
        "by": ["noise"],
        "kind": "equivalence",
        "margin": 0.1,
    }
    write({key: value for key, value in PRIMARY.items() if key != "against"} | presets | {"metric": "dice - target"})
    good, bad = arm("new", 0.52, noise="0.1"), arm("new", 0.9, noise="0.2")
    one = judge(*good, *arm("new", 0.48, noise=0.2))["first"]  # a setting may be text or a number
    assert one.verdict == "holds here"
    assert [part.label for part in one.parts] == ["noise 0.1", "noise 0.2"]
    one = judge(*good, *bad)["first"]
    assert (one.verdict, one.deciding.label) == ("does not hold here", "noise 0.2")
    assert one.deciding.estimate == pytest.approx(0.4, abs=0.02)
    assert judge(*good)["first"].reason == "phantom, cpu: 0 of 5 seeds of method new, noise 0.2"


def test_cases_are_compared_subject_by_subject_and_widen_the_interval(write):
    write(PRIMARY | {"where": {"method": "new", "split": "test"}, "margin": 0.0})
    gains = {"a": 0.3, "b": -0.2, "c": 0.05}  # seeds agree to 0.001, subjects do not agree at all

    def cases(method, seed):
        scores = {
            ("test", s): 0.5 + 0.001 * seed * (s == "a") + (gain if method == "new" else 0) for s, gain in gains.items()
        }
        return record(method, seed, scores | {("other", "a"): 0.0})

    one = judge(*(cases(method, seed) for method in ("new", "old") for seed in range(5)))["first"]
    assert one.deciding.estimate == pytest.approx(0.05)
    assert one.deciding.low < -0.3
    assert one.verdict == "undecided here"


def test_slices_without_a_score_do_not_count_but_a_cell_without_one_is_no_evidence(write):
    write(PRIMARY | {"where": {"method": "new", "split": "test"}})
    several = [{"split": "test", "subject": "a", "dice": dice} for dice in (0.8, float("nan"), 0.6)]
    one = record("new", 0, {("test", "a"): 0.0})
    one.cases[:] = several
    assert claims.scores([one], {"split": "test"}, "dice") == {0: {"a": pytest.approx(0.7)}}
    write(PRIMARY)
    diverged = [record("new", seed, float("nan") if seed == 3 else 0.9) for seed in range(5)]
    assert "dice is not a number at a seed of method new" in judge(*diverged, *arm("old", 0.5))["first"].reason


def test_a_lower_score_can_be_the_better_one(write):
    write(PRIMARY | {"better": "lower"})
    one = judge(*arm("new", 0.2), *arm("old", 0.5))["first"]
    assert one.verdict == "holds here"
    assert one.deciding.low < one.deciding.estimate < one.deciding.high < -0.1


KINDS = {
    "non-inferiority": (
        {"margin": 0.1, "against": {"method": "old"}},
        [("new", 0.45, {}), ("old", 0.5, {})],
        [("new", 0.2, {}), ("old", 0.5, {})],
    ),
    "threshold": ({"margin": 0.7}, [("new", 0.9, {})], [("new", 0.5, {})]),
    "interaction": (
        {"margin": 0.1, "where": {"method": "new", "site": "b"}, "against": {"method": "old"}, "minus": {"site": "a"}},
        [
            ("new", 0.5, {"site": "a"}),
            ("old", 0.8, {"site": "a"}),
            ("new", 0.5, {"site": "b"}),
            ("old", 0.4, {"site": "b"}),
        ],
        [
            ("new", 0.5, {"site": "a"}),
            ("old", 0.4, {"site": "a"}),
            ("new", 0.5, {"site": "b"}),
            ("old", 0.4, {"site": "b"}),
        ],
    ),
    "trend": (
        {"margin": 0.05, "where": {"method": "new", "points": [1, 3, 5]}, "along": "points"},
        [("new", 0.4 + 0.1 * points, {"points": points}) for points in (1, 3, 5)],
        [("new", 0.9 - 0.1 * points, {"points": points}) for points in (1, 3, 5)],
    ),
    "optimum": (
        {"margin": 0.05, "where": {"method": "new", "share": 0.6}, "against": {"share": [0.2, 1.0]}, "along": "share"},
        [("new", value, {"share": share}) for share, value in ((0.2, 0.5), (0.6, 0.7), (1.0, 0.69))],
        [("new", value, {"share": share}) for share, value in ((0.2, 0.5), (0.6, 0.7), (1.0, 0.9))],
    ),
    "ratio": (
        {
            "margin": 3,
            "where": {"method": "new", "labels": [10, 20, 40]},
            "against": {"method": "old", "labels": 80},
            "along": "labels",
        },
        [("old", 0.5, {"labels": 80})] + [("new", 0.3 + 0.02 * n, {"labels": n}) for n in (10, 20, 40)],
        [("old", 0.5, {"labels": 80})] + [("new", 0.01 * n, {"labels": n}) for n in (10, 20, 40)],
    ),
}  # what the claim adds, cells in which it holds, and cells in which it does not


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_its_arms_from_the_records(write, kind):
    more, holding, failing = KINDS[kind]
    write({key: value for key, value in PRIMARY.items() if key != "against"} | more | {"kind": kind})
    for cells, word in ((holding, "holds here"), (failing, "does not hold here")):
        found = [one for method, mean, setting in cells for one in arm(method, mean, **setting)]
        assert judge(*found)["first"].verdict == word


def test_the_other_claims_are_corrected_together_those_without_records_included(write):
    later = {**PRIMARY, "primary": False, "experiment": "trial"}
    others = [later | {"id": f"other {i}", "where": {"method": f"new {i}"}} for i in range(9)]
    others = [one | {"where": {"method": f"new-{i}"}} for i, one in enumerate(others)]
    never = {"id": "never", "title": "T", "sentence": "S", "not_tested": "It cannot be had."}
    write(PRIMARY, *others, never)
    # The same scores decide the primary claim and are too weak after correction among nine.
    scores = [0.1 + 0.02 * x for x in (0.3, 1.0, 1.2, 0.6, 2.1)]
    found = [record(method, seed, 0.5 + scores[seed]) for method in ("new", "new-0") for seed in range(5)]
    found += [record("old", seed, 0.5) for seed in range(5)]
    result = judge(*found)
    assert result["first"].verdict == "holds here"
    assert result["other 0"].verdict == "undecided here"
    assert result["other 0"].p == pytest.approx(9 * result["first"].p)
    assert (result["never"].verdict, result["never"].reason) == ("not tested", "It cannot be had.")


def test_the_whole_procedure_errs_on_the_primary_claim_and_on_the_others_as_rarely_as_it_says(write):
    """400 chapters without any effect beyond the margin: 5 % for the primary claim, 5 % for any of the others."""
    more = [PRIMARY | {"primary": False, "id": f"other-{i}", "where": {"method": f"new-{i}"}} for i in range(4)]
    write(PRIMARY, *more)
    loaded = claims.load_claims("toy")
    generator = np.random.default_rng(8)
    methods = ["new", *(f"new-{i}" for i in range(4))]
    primary = others = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "load_claims", lambda chapter: loaded)
        for _ in range(400):
            found = [record("old", seed, 0.5) for seed in range(5)]
            found += [record(m, seed, 0.6 + x) for m in methods for seed, x in enumerate(generator.normal(0, 0.05, 5))]
            first, *rest = judge(*found).values()
            primary += first.verdict != "undecided here"
            others += any(one.verdict != "undecided here" for one in rest)
    assert 7 <= primary <= 35  # 20 expected, with a standard deviation of 4.4
    assert 7 <= others <= 35


def test_two_cells_of_one_seed_are_an_error_not_an_average(write):
    write(PRIMARY)
    with pytest.raises(UserError, match=r"not its seed's only cell .*name the field that differs"):
        judge(*arm("new", 0.9, start="low"), *arm("new", 0.8, start="high"), *arm("old", 0.5))
    write(PRIMARY | {"metric": "dyce"})
    with pytest.raises(UserError, match="has no number 'dyce'"):
        judge(*arm("new", 0.9), *arm("old", 0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"margn": 1}, "wrong at claims.0.margn: Extra inputs are not permitted"),
        ({"kind": "superb"}, "wrong at claims.0.kind"),
        ({"why": ""}, "claim 'first' lacks why"),
        ({"against": {}}, "kind 'superiority' takes against beside where"),
        ({"minus": {"site": "a"}}, "kind 'superiority' takes against beside where"),
        ({"where": {"method": ["new", "newer"]}}, "lists ['method'] in where, but by and along name []"),
        ({"tasks": ["phantom", "mars"]}, "task 'mars' of a claim is not among tiers"),
        ({"primary": False}, "a chapter has one primary claim, not 0"),
        ({"table": "minor"}, "no table 'minor'"),
        ({"not_tested": "because"}, "claim 'first' is not tested and still has kind"),
    ],
)
def test_a_faulty_claim_is_one_sentence(write, change, sentence):
    write(PRIMARY | change)
    with pytest.raises(UserError) as error:
        claims.load_claims("toy")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_claims_are_rendered_for_people_and_for_programs(write):
    write(PRIMARY, PRIMARY | {"id": "later", "primary": False, "where": {"method": "newer"}})
    found = claims.judge("toy", lambda *_: [*arm("new", 0.9), *arm("old", 0.5)])
    text = claims.render("md", found)
    assert "| **T** (primary) | gain > 0.1 | embedded data: phantom, cpu, 5 seeds | 0.4" in text
    assert "| < 0.001 | holds here |" in text
    assert "not tested: phantom, cpu: 0 of 5 seeds of method newer |" in text
    first, later = json.loads(claims.render("json", found))
    assert (first["id"], first["verdict"], first["tier"], first["source"]) == (
        "first",
        "holds here",
        "embedded",
        "the paper, table 1",
    )
    assert first["parts"][0]["low"] > 0.3
    assert (later["p"], later["parts"], later["tier"]) == (None, [], None)
    with pytest.raises(UserError, match="no format 'html'"):
        claims.render("html", found)
