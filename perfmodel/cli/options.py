"""Options that several verbs share: the instance (model, hardware, degrees, formats) and the request it serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from perfmodel import units
from perfmodel.errors import SpecError, UnitError, did_you_mean

if TYPE_CHECKING:
    from perfmodel.spec.workload import Trace

F = TypeVar("F", bound=Callable[..., Any])


class Quantity(click.ParamType):
    """A positive number with a unit, read into base SI. `bare`: a number without a unit is in the base unit."""

    def __init__(self, kind: str, *, bare: bool = False) -> None:
        self.kind, self.bare, self.name = kind, bare, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self._read(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)
        if number <= 0:
            self.fail(f"{value!r} must be positive", param, ctx)
        return number

    def _read(self, value: Any) -> float:
        if self.bare:
            try:
                return units.parse(value, "ratio")
            except UnitError:
                pass  # it has a unit; read it, or complain about it, as one of this kind
        return units.parse(value, self.kind)


class Finite(click.FloatRange):
    """A number of at least `least` that is neither nan nor infinite, which click's own types let through."""

    def __init__(self, least: float = 0.0, *, above: bool = False) -> None:
        super().__init__(min=least, min_open=above)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class FromPlan(click.Command):
    """A verb about one instance: with --plan, the options that are not given are those of a pool of the plan."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        if isinstance(given.get("plan"), str):
            ctx.default_map = _pool_options(given["plan"], given.get("pool", "1"))
        elif "pool" in given:
            raise SpecError("--pool is a pool of --plan: give both")
        if isinstance(given.get("paper"), str):
            # A paper's settings name these themselves.
            ctx.default_map = {"model": "", "hardware": ""}
        return super().parse_args(ctx, args)


def _pool_options(path: str, pool: str) -> dict[str, Any]:
    from perfmodel.spec import deployment

    plan = deployment.read(path)
    numbers = [str(i + 1) for i in range(len(plan.pools))]
    if pool not in numbers:
        raise SpecError(f"--pool {pool}: the plan's pools are {', '.join(numbers)}", file=path)
    chosen = plan.pools[int(pool) - 1]
    return {
        "model": plan.model, "hardware": chosen.hardware, "engine": plan.engine, "mem_fraction": plan.mem_fraction,
        **{name: getattr(chosen, name) for name in ("tp", "pp", "dp", "cp", "ep", "weight_dtype", "kv_dtype", "techniques")},
    }  # fmt: skip


_PLAN = (
    click.option("--plan", type=click.Path(exists=True, dir_okay=False), expose_value=False,
                 help="A plan.json or deployment YAML: its pool says model, hardware, degrees and formats."),
    click.option("--pool", type=int, expose_value=False, help="Which pool of --plan, from 1.  [1]"),
)  # fmt: skip

# Names and spellings follow vLLM where it has one, so that a serving command can be pasted.
_INSTANCE = (
    click.option("--model", required=True, help="Name, alias or Hugging Face id; a YAML, a config.json or its folder."),
    click.option("--hw", "--hardware", "hardware", required=True, help="Device or node: name, alias or YAML."),
    click.option("--tp", "--tensor-parallel-size", "-tp", type=int, help="Tensor-parallel degree.  [1]"),
    click.option("--pp", "--pipeline-parallel-size", "-pp", type=int, help="Pipeline stages.  [1]"),
    click.option("--dp", "--data-parallel-size", "-dp", type=int, help="Data-parallel ranks of one instance.  [1]"),
    click.option("--cp", type=int, help="Context-parallel degree.  [1]"),
    click.option("--ep", type=int, help="Expert-parallel degree; divides tp x dp x cp.  [1]"),
    click.option("--enable-expert-parallel", "expert_parallel", is_flag=True, help="Set --ep to tp x dp x cp."),
    click.option("--gpus", type=int, help="Devices; sets --tp unless given, and must equal tp x pp x dp x cp."),
    click.option("--weight-dtype", "--quantization", "weight_dtype", help="Weight format.  [the checkpoint's]"),
    click.option("--act-dtype", help="Activation format.  [the weights', else 16 bits]"),
    click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", help="KV-cache format.  [the activations']"),
    click.option("--dtype", help="16- or 32-bit format of activations and of weights that are not quantised."),
    click.option("--engine", default="vllm", show_default=True,
                 help="vllm, sglang, trtllm or llama.cpp; vllm==0.8.5 for a version's memory accounting."),
    click.option("--mem-fraction", "--gpu-memory-utilization", "mem_fraction", type=Quantity("ratio"),
                 help="Share of device memory the engine may use.  [the engine's]"),
    click.option("-t", "--technique", "techniques", multiple=True, metavar="NAME[:k=v,...]",
                 help="A technique, such as kv-quantization:bits=4; may be repeated. `perfmodel techniques` lists them."),
)  # fmt: skip

_REQUEST = (
    click.option("--batch", "--batch-size", "batch", type=int, default=1, show_default=True, help="Sequences."),
    click.option("--isl", "--input-len", "isl", type=int, default=1024, show_default=True, help="Prompt tokens each."),
    click.option("--osl", "--output-len", "osl", type=int, default=128, show_default=True, help="Output tokens each."),
    click.option("--prefix", type=int, default=0, show_default=True, help="Prompt tokens already cached."),
    click.option("--ttft", type=Quantity("time"), help="Limit on the time to first token, such as '2 s'."),
    click.option("--tpot", type=Quantity("time"), help="Limit on the time per output token, such as '50 ms'."),
    click.option("--rate", type=Quantity("rate", bare=True), help="Requests per second: adds latency under this load."),
    click.option("--concurrency", type=int, help="Requests in flight: adds latency under this load."),
    click.option("--price", type=Quantity("price"), help="Of a whole node, such as '88 USD/h'.  [the catalogue's]"),
)  # fmt: skip


def _apply(options: tuple[Any, ...], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def instance_options(function: F) -> F:
    """Model, hardware, degrees and formats of one instance."""
    return _apply(_INSTANCE, function)


def estimate_options(function: F) -> F:
    """Everything one estimate is asked with; the verb's class is `FromPlan`."""
    return _apply((*_INSTANCE, *_REQUEST, *_PLAN), function)


def trace_of(
    file: str, columns: tuple[str, ...], where: tuple[str, ...], block_tokens: int, *, keep_ticks: bool = False
) -> Trace:
    """How to read a trace, from --column ROLE=NAME, --where COLUMN=VALUE and the rest. Raises SpecError for an unknown role."""
    from perfmodel.spec.workload import Columns, Label, Trace

    labels: tuple[str, ...] = get_args(Label)
    roles = [*(name for name in Columns.model_fields if name not in ("labels", "where")), *labels]
    named = _pairs("--column", "ROLE=NAME", columns)
    for role in named:
        if role not in roles:
            raise SpecError(f"--column: {role!r} is not a role{did_you_mean(role, roles)}; there are {', '.join(roles)}")
    if {"arrival_s", "arrival_ms"} <= named.keys():
        raise SpecError("--column: name either arrival_s or arrival_ms")
    said = {name: named.pop(name) for name in labels if name in named}
    found = Columns.model_validate({**named, "labels": said, "where": _pairs("--where", "COLUMN=VALUE", where)})
    return Trace(file=file, columns=found, block_tokens=block_tokens, spread_ticks=not keep_ticks)


def refuse_reading_options(columns: tuple[str, ...], where: tuple[str, ...]) -> None:
    """A fitted workload has no columns to name or rows to choose: its options would do nothing."""
    for option, given in (("--column", columns), ("--where", where)):
        if given:
            raise SpecError(f"{option} is about the columns of a trace, and this is a fitted workload: leave it out")


def _pairs(option: str, form: str, given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise SpecError(f"{option}: write {form}, not {text!r}")
    return dict(text.split("=", 1) for text in given)


def estimate_arguments(
    *,
    gpus: int | None,
    expert_parallel: bool,
    dtype: str | None,
    tp: int | None,
    pp: int | None,
    dp: int | None,
    cp: int | None,
    ep: int | None,
    **rest: Any,
) -> dict[str, Any]:
    """Arguments of `perfmodel.estimate` from the options: degrees and formats decided."""
    for name, value in (("gpus", gpus), ("concurrency", rest.get("concurrency"))):
        if value is not None and value < 1:
            raise SpecError(f"--{name} must be a whole number of at least 1, got {value}")
    tp, pp, dp, cp = degrees(gpus, tp=tp, pp=pp, dp=dp, cp=cp)
    if expert_parallel:
        if ep not in (None, tp * dp * cp):
            raise SpecError(
                f"--enable-expert-parallel spreads the experts over tp x dp x cp = {tp * dp * cp} devices, "
                f"but --ep says {ep}"
            )
        ep = tp * dp * cp
    if dtype not in (None, "auto"):
        rest |= _plain_formats(str(dtype), rest)
    for name in ("weight_dtype", "act_dtype", "kv_dtype"):
        rest[name] = None if rest[name] == "auto" else rest[name]
    return {"tp": tp, "pp": pp, "dp": dp, "cp": cp, "ep": 1 if ep is None else ep, **rest}


def degrees(
    gpus: int | None, *, tp: int | None, pp: int | None, dp: int | None, cp: int | None
) -> tuple[int, int, int, int]:
    """(tp, pp, dp, cp): what is not given is 1, except that --gpus decides tp.

    >>> degrees(8, tp=None, pp=2, dp=None, cp=None)
    (4, 2, 1, 1)
    """
    others = (pp or 1) * (dp or 1) * (cp or 1)
    if gpus is not None:
        if tp is None and others > 0 and gpus % others == 0:
            tp = gpus // others
        total = (1 if tp is None else tp) * others
        if total != gpus:
            raise SpecError(f"--gpus {gpus} contradicts tp x pp x dp x cp = {total}; leave one of them out")
    one = (1 if degree is None else degree for degree in (tp, pp, dp, cp))
    return next(one), next(one), next(one), next(one)


def _plain_formats(dtype: str, given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's --dtype: activations, and weights too where the checkpoint does not quantise them."""
    from perfmodel import catalog
    from perfmodel.spec.formats import get_format

    if get_format(dtype).width < 2:
        raise SpecError(f"--dtype {dtype} is a quantised format; give it as --weight-dtype")
    model = catalog.load_model(given["model"])
    plain = model.expert_dtype is None and get_format(model.dtype).width >= 2
    return {
        "act_dtype": given["act_dtype"] or dtype,
        "weight_dtype": given["weight_dtype"] or (dtype if plain else None),
    }
