"""The papers' claims, `claims/<chapter>.yaml`, and what our records say of each.

A claim is judged on one task and one profile: the first of its tasks, strongest evidence first, and the first of
`paper`, `gpu` and `cpu` (never `smoke`) that has five seeds of every arm. Stale records, and those of an earlier
configuration of the profile, are left out, and the verdict says how many.

On real data a claim is *reproduced*, *contradicted* or *inconclusive*; on embedded data it *holds here*, *does not hold
here*, or is *undecided here*: an interval across the margin speaks neither for nor against, and to call that "does not
hold" would turn a lack of seeds into a finding. Everything else is *not tested*, with the reason.

A claim about trained networks may say when its records are too early to decide it (`settled`): if an arm still gains
from further training, the comparison is of who learns faster, and the verdict is *inconclusive* or *undecided here*
whichever way it points.

The chapter's primary claim is decided by itself; the others are Holm-corrected together, those without records yet
included, so that a later experiment does not change how many they are.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import papers, verdicts
from synthrepro.evidence.experiments import chapters
from synthrepro.evidence.papers import Data
from synthrepro.evidence.records import Record
from synthrepro.evidence.records import records as stored_records
from synthrepro.evidence.scores import Fields, Scalar, current, paired, plain, scores
from synthrepro.evidence.verdicts import ALPHA, SEEDS, Array, Part

Tier = Literal["paper", "real", "embedded"]
Kind = Literal["superiority", "non-inferiority", "threshold", "equivalence", "interaction", "trend", "optimum", "ratio"]
Records = Callable[[str, str], list[Record]]

PROFILES = ("paper", "gpu", "cpu")  # the strongest first; smoke is no evidence
TIERS = {
    "paper": "the paper's own data and weights",
    "real": "other real data",
    "embedded": "embedded data",
}
# What a kind takes beside `where`, and what it asks of the margin m.
TAKES: dict[Kind, set[str]] = {
    "superiority": {"against"},
    "non-inferiority": {"against"},
    "threshold": set(),
    "equivalence": set(),
    "interaction": {"against", "minus"},
    "trend": {"along"},
    "optimum": {"against", "along"},
    "ratio": {"against", "along"},
}
ASKS: dict[Kind, str] = {
    "superiority": "gain > {m:g}",
    "non-inferiority": "loss < {m:g}",
    "threshold": "score beyond {m:g}",
    "equivalence": "difference within ±{m:g}",
    "interaction": "gain exceeds the other gain by > {m:g}",
    "trend": "each step loses < {m:g}, the last beats the first",
    "optimum": "regret < {m:g}",
    "ratio": "> {m:g} times fewer",
}


class Settled(Data):
    """When a comparison of trained networks means something: the arm has stopped gaining.

    Attributes:
        where: the arm, and the split of its cases.
        metric: such as "dice_flops - dice", what it gained by training further.
        within: the most that this may be on average.
    """

    where: dict[str, Scalar]
    metric: str
    within: float


class Claim(Data):
    """One claim of a paper. A claim with `not_tested`, a reason, has none of the attributes below it.

    Attributes:
        title: the claim as we test it; `sentence`: as the paper, or the summary of it, puts it.
        table: id of the paper's table that carries it.
        margin: see `verdicts`, in the metric's unit; for `ratio` how many times fewer samples.
        why: one line that justifies the margin.
        tasks: what it may be judged on, strongest evidence first.
        metric: a record's metric, or a difference "a - b" of two; with `split` among the fields of `where`, the score
            of that name of each case of the split. Several metrics must all pass.
        better: which way of the metric is good.
        where: field of the cell (method, a setting) or `split` -> value, a list for the fields of `by` and `along`.
        against: laid over `where`, the arm it is compared with; for `optimum`, the other levels as a list.
        minus: laid over both arms, the comparison whose difference is subtracted (`interaction`).
        along: the field that makes levels: rising sizes for `ratio`, the worst first for `trend`.
        by: the claim must hold at each value of these fields.
        settled: without it met, the records decide nothing, whichever way they point.
    """

    id: str
    title: str
    sentence: str
    table: str | None = None
    note: str = ""
    primary: bool = False
    not_tested: str = ""
    kind: Kind | None = None
    margin: float | None = None
    why: str = ""
    experiment: str = ""
    tasks: list[str] = Field(default_factory=list)
    metric: str | list[str] = ""
    better: Literal["higher", "lower"] = "higher"
    where: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    against: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    minus: dict[str, Scalar] = Field(default_factory=dict)
    along: str = ""
    by: list[str] = Field(default_factory=list)
    settled: Settled | None = None

    @property
    def metrics(self) -> list[str]:
        return [self.metric] if isinstance(self.metric, str) else self.metric

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        needed = ("kind", "margin", "why", "experiment", "tasks", "metric", "where")
        given = [name for name in needed if getattr(self, name) not in (None, "", [], {})]
        if self.not_tested and given:
            raise ValueError(f"claim {self.id!r} is not tested and still has {', '.join(given)}")
        if self.not_tested:
            return self
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"claim {self.id!r} lacks {', '.join(missing)}")
        assert self.kind is not None
        takes = {name for name in ("against", "minus", "along") if getattr(self, name)}
        if takes != TAKES[self.kind] and not (self.kind == "equivalence" and takes == {"against"}):
            wanted = ", ".join(sorted(TAKES[self.kind])) or "nothing"
            raise ValueError(f"claim {self.id!r} of kind {self.kind!r} takes {wanted} beside where")
        lists = {name for name, value in self.where.items() if isinstance(value, list)}
        named = {*self.by} | ({self.along} if self.kind in ("trend", "ratio") else set())
        if lists != named:
            raise ValueError(f"claim {self.id!r} lists {sorted(lists)} in where, but by and along name {sorted(named)}")
        return self


class Place(Data):
    """Where a paper's value stands; `{field}` in row and column is replaced by the cell's own value.

    `label` tells several places of one column apart.
    """

    table: str
    row: str
    column: str
    label: str = ""


class Column(Data):
    """A metric as a column of one of our tables; with `split`, a score of its cases."""

    metric: str
    label: str
    digits: int = 3
    split: str | None = None
    paper: Place | list[Place] = Field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        return self.paper if isinstance(self.paper, list) else [self.paper]


class TableSpec(Data):
    """One of our tables: a row for each combination of `rows`, among the cells that agree with `where`.

    `names` translates our values into the paper's where a `Place` is filled in.
    """

    id: str
    title: str
    where: dict[str, Scalar] = Field(default_factory=dict)
    rows: dict[str, list[Scalar]]
    names: dict[str, str] = Field(default_factory=dict)
    metrics: list[Column]


class Claims(Data):
    """A chapter's claims file: how far evidence on each task carries, the claims, and the tables of each experiment."""

    tiers: dict[str, Tier]
    claims: list[Claim]
    tables: dict[str, list[TableSpec]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Claims":
        ids = [claim.id for claim in self.claims]
        if twice := [name for name in ids if ids.count(name) > 1]:
            raise ValueError(f"claim {twice[0]!r} stands twice")
        if unknown := [task for claim in self.claims for task in claim.tasks if task not in self.tiers]:
            raise ValueError(f"task {unknown[0]!r} of a claim is not among tiers")
        if self.claims and (primary := sum(claim.primary for claim in self.claims)) != 1:
            raise ValueError(f"a chapter has one primary claim, not {primary}")
        return self


def load_claims(chapter: str) -> Claims:
    """The claims file of a chapter.

    Raises:
        UserError: it is missing or faulty, or names a table that the paper does not have (one sentence).
    """
    found = papers.load(claims_file(chapter), Claims)
    columns = [column for specs in found.tables.values() for spec in specs for column in spec.metrics]
    named = {claim.table for claim in found.claims if claim.table}
    named |= {place.table for column in columns for place in column.places}
    if named:
        paper = papers.paper(chapter)
        for name in named:
            paper.table(name)
    return found


def claims_file(chapter: str) -> Path:
    """Where a chapter's claims are, or would be."""
    return paths.PACKAGE / "evidence" / "claims" / f"{chapter}.yaml"


@dataclass(frozen=True)
class Verdict:
    """What the records say of one claim.

    Attributes:
        source: where the paper's values stand.
        verdict: its word.
        reason: why it is not tested or decides nothing, or what was left out.
        tier, task, profile, seeds: what it stands on; None and 0 where it is not tested.
        parts: all comparisons that the claim asks for.
        holds, fails: p-values of the evidence for and against it.
        p: two-sided p-value, Holm-corrected unless the claim is primary; a decision needs p < 0.05.
    """

    chapter: str
    claim: Claim
    source: str
    verdict: str = "not tested"
    reason: str = ""
    tier: Tier | None = None
    task: str | None = None
    profile: str | None = None
    seeds: int = 0
    parts: tuple[Part, ...] = ()
    holds: float = math.nan
    fails: float = math.nan
    p: float = math.nan

    @property
    def deciding(self) -> Part | None:
        """The comparison that decides: the clearest against the claim where it fails, else the weakest for it."""
        if self.fails < self.holds:
            return min(self.parts, key=lambda part: float(part.fails))
        return max(self.parts, key=lambda part: float(part.holds), default=None)


class _NotTested(Exception):
    """Why some records cannot judge a claim."""


def judge(chapter: str, records: Records = stored_records) -> list[Verdict]:
    """Verdicts on a chapter's claims, in the file's order.

    Args:
        records: (chapter, experiment) -> records; the stored ones unless told otherwise.

    Raises:
        UserError: the claims file is missing or faulty, or records do not have what a claim names.
    """
    loaded, once = load_claims(chapter), cache(records)
    found = [_judge(chapter, claim, loaded.tiers, once) for claim in loaded.claims]
    family = [i for i, one in enumerate(found) if not (one.claim.primary or one.claim.not_tested)]
    for i, p in zip(family, verdicts.holm([found[i].p for i in family]), strict=True):
        found[i] = replace(found[i], p=p)
    return [_worded(one) for one in found]


def judge_all() -> list[Verdict]:
    """Verdicts of every chapter that has claims."""
    return [one for chapter in chapters() if claims_file(chapter).is_file() for one in judge(chapter)]


def _worded(one: Verdict) -> Verdict:
    if one.tier is None:
        return replace(one, p=math.nan)
    words = ("holds here", "does not hold here", "undecided here")
    if one.tier != "embedded":
        words = ("reproduced", "contradicted", "inconclusive")
    return replace(one, verdict=words[2 if one.p >= ALPHA else 0 if one.holds < one.fails else 1])


def _judge(chapter: str, claim: Claim, tiers: Mapping[str, Tier], records: Records) -> Verdict:
    """The verdict, but for Holm's correction and the word."""
    source = papers.paper(chapter).source(papers.table(chapter, claim.table)) if claim.table else ""
    untested = Verdict(chapter, claim, source, reason=claim.not_tested, p=1.0)
    if claim.not_tested:
        return untested
    found = records(chapter, claim.experiment)
    reasons = []
    for task, profile in product(claim.tasks, PROFILES):
        here = [record for record in found if (record.cell.task, record.profile) == (task, profile)]
        fresh = [record for record in here if not record.stale]
        usable = current(fresh)
        counts = {"stale": len(here) - len(fresh), "of an earlier configuration": len(fresh) - len(usable)}
        left_out = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        left_out = f"left out: {left_out}" if left_out else ""
        try:
            parts, seeds = _compare(claim, usable)
        except _NotTested as reason:
            if here:
                reasons.append(f"{task}, {profile}: {reason}" + (f" ({left_out})" if left_out else ""))
            continue
        holds, fails = (float(p) for p in verdicts.combine(parts))
        p = float(verdicts.two_sided(holds, fails))
        tier = tiers[task]
        if unsettled := _unsettled(claim, usable):
            p, left_out = 1.0, "; ".join(filter(None, [unsettled, left_out]))
        return Verdict(chapter, claim, source, "", left_out, tier, task, profile, seeds, tuple(parts), holds, fails, p)
    smoke = "only smoke records" if any(record.profile == "smoke" for record in found) else "no records yet"
    return replace(untested, reason="; ".join(reasons) or f"experiment {claim.experiment} has {smoke}")


def _compare(claim: Claim, found: Sequence[Record]) -> tuple[list[Part], int]:
    """All comparisons of a claim, and the number of seeds that the poorest of them stands on."""
    parts, seeds = [], []
    for values in product(*(_levels(claim.where, name) for name in claim.by)):
        group = dict(zip(claim.by, values, strict=True))
        for metric in claim.metrics:
            names = [f"{name} {value}" for name, value in group.items()] + [metric] * (len(claim.metrics) > 1)
            wanted = _arms(claim, group)
            measured = [scores(found, arm, metric) for arm in wanted]
            for arm, each in zip(wanted, measured, strict=True):
                about = ", ".join(f"{name} {value}" for name, value in arm.items())
                if len(each) < SEEDS:
                    raise _NotTested(f"{len(each)} of {SEEDS} seeds of {about}")
                if not all(math.isfinite(score) for seed in each.values() for score in seed.values()):
                    raise _NotTested(f"{metric} is not a number at a seed of {about}")
            arms = paired(measured)
            seeds.append(len(arms[0]))
            if seeds[-1] < SEEDS:
                raise _NotTested(f"{seeds[-1]} of {SEEDS} seeds that all arms share")
            for part in _decide(claim, arms):
                parts.append(replace(part, label=", ".join([*names, *filter(None, [part.label])])))
    return parts, min(seeds)


def _unsettled(claim: Claim, found: Sequence[Record]) -> str:
    """Why the networks compared are not trained far enough to compare them; empty if they are."""
    if claim.settled is None:
        return ""
    wanted = claim.settled
    (array,) = paired([scores(found, wanted.where, wanted.metric)])
    if not len(array):
        return f"too early to tell: {wanted.where['method']} is not measured, which shows whether training is done"
    gain = float(array.mean())
    if gain <= wanted.within:
        return ""
    return f"too early: {wanted.where['method']} still gains {gain:.3f} ({wanted.metric}), more than {wanted.within:g}"


def _levels(where: Mapping[str, Scalar | list[Scalar]], name: str) -> list[Scalar]:
    value = where[name]
    return value if isinstance(value, list) else [value]


def _arms(claim: Claim, group: Fields) -> list[Any]:
    """The cells to compare, each as a full `where`."""
    where = {**claim.where, **group}
    against = {**where, **claim.against}
    along = claim.along
    match claim.kind:
        case "interaction":
            return [where, against, {**where, **claim.minus}, {**against, **claim.minus}]
        case "trend":
            return [{**where, along: level} for level in _levels(where, along)]
        case "optimum":
            return [where, *({**against, along: level} for level in _levels(against, along))]
        case "ratio":
            return [against, *({**where, along: size} for size in _levels(where, along))]
        case _:
            return [where, against] if claim.against else [where]


def _decide(claim: Claim, arms: Sequence[Array]) -> list[Part]:
    assert claim.margin is not None
    margin, up = claim.margin, 1 if claim.better == "higher" else -1
    first, *rest = [up * arm for arm in arms]
    match claim.kind:
        case "superiority":
            parts = verdicts.superiority(first - rest[0], margin)
        case "non-inferiority":
            parts = verdicts.noninferiority(first - rest[0], margin)
        case "threshold":
            parts = verdicts.threshold(first, up * margin)
        case "equivalence":
            parts = verdicts.equivalence(first - rest[0] if rest else first, margin)
        case "interaction":
            parts = verdicts.interaction(first - rest[0], rest[1] - rest[2], margin)
        case "trend":
            parts = verdicts.trend([first, *rest], margin)
        case "optimum":
            parts = verdicts.optimum(first, rest, margin)
        case _:
            sizes = [float(size) for size in _levels(claim.where, claim.along)]
            return verdicts.ratio(sizes, rest, first, float(_levels(claim.against, claim.along)[0]), margin)
    if up < 0:  # shown as measured
        return [replace(part, estimate=-part.estimate, low=-part.high, high=-part.low) for part in parts]
    return parts


def render(format: str = "md", found: Sequence[Verdict] | None = None) -> str:
    """Verdicts as Markdown ("md") or JSON ("json"); those of all chapters unless given.

    Raises:
        UserError: an unknown format.
    """
    found = judge_all() if found is None else found
    if format == "json":
        return json.dumps([_plain(one) for one in found], indent=2, ensure_ascii=False)
    if format != "md":
        raise UserError(f"There is no format {format!r} for claims: choose md or json.")
    lines = ["| claim | asks | evidence | estimate [95 % interval] | p | verdict |", "| --- " * 6 + "|"]
    return "\n".join(lines + [_row(one) for one in found]) + "\n"


def _row(one: Verdict) -> str:
    claim, part = one.claim, one.deciding
    title = f"**{claim.title}** (primary)" if claim.primary else claim.title
    asks = ASKS[claim.kind].format(m=claim.margin) if claim.kind else ""
    if part is None:
        return f"| {title} | {asks} | – | – | – | {one.verdict}: {one.reason} |"
    evidence = f"{TIERS[one.tier or 'embedded']}: {one.task}, {one.profile}, {one.seeds} seeds"
    estimate = f"{part.estimate:.3g} [{part.low:.3g}, {part.high:.3g}]" + (f" at {part.label}" if part.label else "")
    verdict = one.verdict
    if one.p >= ALPHA and not one.reason.startswith("too early"):
        verdict += f" (could have seen {part.smallest:.2g} from the margin)"
    verdict += f"; {one.reason}" if one.reason else ""
    p = "–" if one.reason.startswith("too early") else "< 0.001" if one.p < 0.001 else f"{one.p:.3f}"
    return f"| {title} | {asks} | {evidence} | {estimate} | {p} | {verdict} |"


def _plain(one: Verdict) -> dict[str, Any]:
    about = one.claim.model_dump(include={"id", "title", "sentence", "primary", "kind", "margin", "why", "note"})
    names = ("source", "verdict", "reason", "tier", "task", "profile", "seeds", "p")
    stands = {name: getattr(one, name) for name in names}
    stands["parts"] = [asdict(part) for part in one.parts]
    return {"chapter": one.chapter, **about, **plain(stands)}
