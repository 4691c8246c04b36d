"""Run a paper: every claim at its stated parameters, over the paper's range, and at the ends of what was assumed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfmodel import catalog
from perfmodel.errors import Infeasible, PerfmodelError, SpecError, did_you_mean
from perfmodel.papers import expression
from perfmodel.papers.metrics import Bare, Measured, known
from perfmodel.papers.replayed import Replayed
from perfmodel.papers.setting import merged, resolve
from perfmodel.papers.verdict import COUNTED, Evidence, Verdict, judge, meets, middle, no_effect
from perfmodel.spec import yaml
from perfmodel.spec.paper import Claim, Paper, Prediction
from perfmodel.techniques.registry import kinds

_MOST_POINTS = 64


@dataclass(frozen=True)
class Result:
    """One claim (or a prediction without one) and what became of it."""

    paper: str
    metric: str
    unit: str
    direction: str
    setting: str
    claimed: float | tuple[float, float] | None
    predicted: float | None
    low: float | None
    high: float | None
    verdict: Verdict | None
    reason: str
    sourced: bool
    """Every parameter it uses is from the paper."""
    nulls: tuple[bool, bool]
    """Whether `no effect`, and bytes or FLOPs alone, would have met it."""

    def data(self) -> dict[str, Any]:
        """Plain data, as `papers --json` prints it."""
        claimed = list(self.claimed) if isinstance(self.claimed, tuple) else self.claimed
        return {
            "paper": self.paper, "metric": self.metric, "claimed": claimed, "predicted": self.predicted, "low": self.low,
            "high": self.high, "verdict": self.verdict, "reason": self.reason, "unit": self.unit, "setting": self.setting,
            "sourced": self.sourced, "null_no_effect": self.nulls[0], "null_ratio_alone": self.nulls[1],
        }  # fmt: skip


def load(name: str) -> Paper:
    """A paper by id or by the path of a file. Raises SpecError with file and line."""
    path = catalog.find("papers", name)
    document = yaml.read(path)
    paper = yaml.validate(document, Paper)
    _check_literals(paper, document)
    for i, claim in enumerate(paper.claims):
        for text in (claim.predict, claim.bound):
            if text is not None:
                _check_names(paper, text, document, ("claims", i))
    for i, prediction in enumerate(paper.predictions):
        _check_names(paper, prediction.predict, document, ("predictions", i))
    return paper


_FREE = ("system", "like", "batching", "policy", "routing")


def _check_literals(paper: Paper, document: yaml.Document) -> None:
    """Raise SpecError for a number or a name that a setting states without its origin."""

    def bare(value: Any) -> bool:
        if isinstance(value, str):
            return not value.startswith("=") and value != "max"
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1)

    for name, setting in paper.settings.items():
        named = {f: v for f, v in setting if f not in (*_FREE, "techniques", "roles", "fleet", "classes")}
        for kind, items in (("fleet", setting.fleet), ("classes", setting.classes)):
            named |= {f"{kind}.{i}.{k}": v for i, item in enumerate(items) for k, v in item.items()}
        for technique in setting.techniques:
            # Words among a technique's knobs say how it works, not how much.
            knobs = technique.items() if isinstance(technique, dict) else ()
            named |= {f"technique.{k}": v for k, v in knobs if k not in ("kind", "preset") and not isinstance(v, str)}
        for role, own in setting.roles.items():
            named |= {f"{role}.{k}": v for k, v in own.items() if k not in (*_FREE, "techniques")}
        for place, value in named.items():
            if bare(value):
                raise SpecError(
                    f"{place} is a bare {value!r}: name it under `parameters` with where it is from, "
                    f"and write `={place.split('.')[-1]}`",
                    file=document.file, line=document.line(("settings", name)), path=f"settings.{name}",
                )  # fmt: skip


def _check_names(paper: Paper, text: str, document: yaml.Document, at: tuple[str | int, ...]) -> None:
    """Raise SpecError, with the line, for an expression that uses a name nobody gave."""
    try:
        used = expression.names(text)
    except SpecError as error:
        raise SpecError(str(error), file=document.file, line=document.line(at)) from None
    for path in used:
        named = [*paper.parameters, *paper.settings]
        if path[0] not in named:
            wrong = f"{path[0]!r} is no parameter and no setting{did_you_mean(path[0], named)}"
        elif path[0] in paper.settings and (len(path) != 2 or path[1] not in _metrics()):
            asked = path[1] if len(path) > 1 else ""
            wrong = f"{'.'.join(path)!r} is no metric of a setting{did_you_mean(asked, _metrics())}"
        elif path[0] in paper.parameters and len(path) > 1:
            wrong = f"{path[0]!r} is a parameter: it has no {path[1]!r}"
        else:
            continue
        raise SpecError(wrong, file=document.file, line=document.line(at))


def _metrics() -> list[str]:
    return sorted({*known(), *(n for n in dir(Replayed) if not n.startswith("_") and n != "setting")})


class Runner:
    """Evaluates the expressions of one paper; settings that come out the same are computed once."""

    def __init__(self, paper: Paper) -> None:
        self.paper = paper
        self.given = {name: p.value for name, p in paper.parameters.items()}
        self._measured: dict[tuple[str, type], Measured] = {}
        self._found: dict[tuple[Any, ...], Measured] = {}
        self._asked: list[str] = []

    def value(self, text: str, change: Mapping[str, Any], kind: type[Measured] = Replayed) -> float:
        """One expression with some parameters changed."""
        values = {**self.given, **change}

        def look(path: tuple[str, ...]) -> Any:
            if len(path) == 1:
                return float(values[path[0]])
            return ask(self.setting(path[0], values, kind), path[1])

        return float(expression.evaluate(text, look))

    def setting(self, name: str, values: Mapping[str, Any], kind: type[Measured]) -> Measured:
        """A setting at some values of the parameters, measured."""
        here = (name, kind, *values.values())
        if here not in self._found:
            self._found[here] = self._resolved(name, values, kind)
        return self._found[here]

    def _resolved(self, name: str, values: Mapping[str, Any], kind: type[Measured]) -> Measured:
        if name in self._asked:
            raise SpecError(f"settings of {self.paper.id} ask each other in a circle: {' -> '.join((*self._asked, name))}")
        self._asked.append(name)
        try:
            resolved = resolve(self.paper, name, values, lambda s, m: ask(self.setting(s, values, kind), m))
        finally:
            self._asked.pop()
        key = (resolved.key, kind)
        if key not in self._measured:
            self._measured[key] = kind(resolved)
        return self._measured[key]

    def over(
        self, text: str, sweep: Mapping[str, tuple[Any, ...]], change: Mapping[str, Any], kind: type[Measured] = Replayed
    ) -> tuple[float, ...]:
        """One expression over every point of a sweep; points that are infeasible are left out unless all are."""
        axes = [[(name, v) for v in values] for name, values in sweep.items()]
        points = [dict(p) for p in itertools.product(*axes)]
        if len(points) > _MOST_POINTS:
            raise SpecError(f"a sweep of {len(points)} points in {self.paper.id}; at most {_MOST_POINTS}")
        found, why = [], None
        for point in points:
            try:
                found.append(self.value(text, {**change, **point}, kind))
            except Infeasible as error:
                why = error
        if not found and why is not None:
            raise why
        return tuple(found)

    def rests_on(self, text: str) -> set[str]:
        """Parameters an expression uses, by itself or through its settings."""
        found: set[str] = set()
        for path in expression.names(text):
            found |= {path[0]} if path[0] in self.given else inputs(self.paper, path[0])
        return found

    def presets(self, text: str) -> bool:
        """Whether a preset with assumed numbers takes part."""
        named = {path[0] for path in expression.names(text)} & set(self.paper.settings)
        plain = [t for n in named for t in merged(self.paper, n).get("techniques", ()) if isinstance(t, str)]
        chosen = [catalog.load_preset(n) for n in {t.partition(":")[0] for t in plain} - set(kinds())]
        return any("assumed" in preset.number_sources.values() for preset in chosen)


def ask(measured: Measured, metric: str) -> float:
    """A metric of a setting by name. Raises SpecError where this kind of measurement has none."""
    if not hasattr(type(measured), metric):
        raise SpecError(f"a setting has no metric {metric!r}{did_you_mean(metric, _metrics())}")
    return float(getattr(measured, metric))


def inputs(paper: Paper, name: str) -> set[str]:
    """Parameters that a setting's fields name, by themselves or through metrics of other settings."""
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, str) and value.startswith("="):
            for path in expression.names(value[1:]):
                found.update(inputs(paper, path[0]) if path[0] in paper.settings else {path[0]})
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(merged(paper, name))
    return found


def run(paper: Paper) -> list[Result]:
    """Every claim of a paper, then its predictions."""
    runner = Runner(paper)
    return [_claim(runner, c) for c in paper.claims] + [_prediction(runner, p) for p in paper.predictions]


def _claim(runner: Runner, claim: Claim) -> Result:
    if claim.predict is None:
        verdict: Verdict = "input" if claim.not_ours else "open"
        reason = claim.not_ours or claim.open or ""
        return _result(runner, claim, None, (), verdict, reason, sourced=False)
    given = runner.paper.parameters
    everything = runner.rests_on(claim.predict)
    used = everything - set(claim.sweep)
    assumed = tuple(sorted(n for n in used if given[n].origin == "assumed"))
    swept = tuple(sorted(n for n in everything & set(claim.sweep) if given[n].origin == "assumed"))
    sourced = not assumed and not swept and not runner.presets(claim.predict)
    try:
        values = runner.over(claim.predict, claim.sweep, {})
        varied = tuple(_varied(runner, claim, assumed))
        bound = None if claim.bound is None else max(runner.over(claim.bound, claim.sweep, {}))
    except Infeasible as error:
        return _result(runner, claim, None, (), "open", f"does not run as read here: {error}", sourced=sourced)
    measured = any(given[n].origin == "measured" for n in used)
    verdict, reason = judge(claim, Evidence(values, varied, measured, assumed, swept, bound))
    every = [_summary(claim, v) for v in (values, *varied)]
    return _result(runner, claim, _summary(claim, values), every, verdict, reason, sourced=sourced)


def _varied(runner: Runner, claim: Claim, assumed: tuple[str, ...]) -> list[tuple[float, ...]]:
    """The prediction with one assumed parameter after the other elsewhere in its range."""
    assert claim.predict is not None
    found = []
    for name in assumed:
        p = runner.paper.parameters[name]
        for other in (*(p.range or ()), *p.others):
            if other == p.value:
                continue
            try:
                found.append(runner.over(claim.predict, claim.sweep, {name: other}))
            except Infeasible:
                continue
    return found


def _summary(claim: Claim, values: tuple[float, ...]) -> float:
    """The one number that stands for a sweep."""
    return max(values) if claim.reach == "up-to" else middle(values)


def _result(
    runner: Runner, claim: Claim, predicted: float | None, every: Any, verdict: Verdict, reason: str, *, sourced: bool
) -> Result:
    low, high = (min(every), max(every)) if every else (None, None)
    return Result(
        runner.paper.id, claim.metric, claim.unit, claim.direction, claim.setting, claim.claimed, predicted, low, high, verdict,
        reason, sourced, _nulls(runner, claim) if verdict in COUNTED and claim.predict else (False, False),
    )  # fmt: skip


def _nulls(runner: Runner, claim: Claim) -> tuple[bool, bool]:
    """Whether `no effect`, and bytes over bandwidth or FLOPs over peak alone, meet the claim."""
    assert claim.predict is not None
    nothing = no_effect(claim)
    try:
        return nothing, meets(runner.over(claim.predict, claim.sweep, {}, Bare), claim)
    except PerfmodelError:
        # A metric under load has no meaning without queues.
        return nothing, False


def _prediction(runner: Runner, p: Prediction) -> Result:
    values = runner.over(p.predict, p.sweep, {})
    used = runner.rests_on(p.predict)
    sourced = all(runner.paper.parameters[n].origin != "assumed" for n in used) and not runner.presets(p.predict)
    return Result(
        runner.paper.id, p.metric, p.unit, "", p.setting, None, middle(values), min(values), max(values), None, "", sourced,
        (False, False),
    )  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Claims by verdict, and how often the null models would have met them."""

    verdicts: dict[str, int]
    counted: int
    sourced: dict[str, int]
    """Verdicts of the claims whose every parameter is from its paper."""
    null_no_effect: int
    null_ratio_alone: int

    def share(self, *verdicts: Verdict) -> float:
        """Of the counted claims."""
        return sum(self.verdicts.get(v, 0) for v in verdicts) / max(self.counted, 1)


def score(results: list[Result]) -> Score:
    """What all claims together came to."""
    claims = [r for r in results if r.verdict is not None]
    counted = [r for r in claims if r.verdict in COUNTED]
    return Score(
        _tally(claims), len(counted), _tally([r for r in counted if r.sourced]),
        sum(r.nulls[0] for r in counted), sum(r.nulls[1] for r in counted),
    )  # fmt: skip


def _tally(results: list[Result]) -> dict[str, int]:
    found: dict[str, int] = {}
    for r in results:
        found[str(r.verdict)] = found.get(str(r.verdict), 0) + 1
    return found
