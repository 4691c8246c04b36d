"""perfmodel place experts: which rank holds which expert, and which experts are held more than once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Finite
from perfmodel.cli.text import echo_json, heading, number, seconds, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    import numpy as np

    from perfmodel.planner.placement.experts import Demand, Placed, Ranks
    from perfmodel.planner.placement.routing import Layer


@click.command("experts")
@click.option("--model", required=True, help="A model with experts: name, alias, Hugging Face id or file.")
@click.option("--hw", "--hardware", "hardware", required=True, help="Device or node: name, alias or YAML.")
@click.option("--ep", "ranks", type=click.IntRange(2), required=True, help="Expert-parallel ranks, one device each.")
@click.option("--nodes", type=click.IntRange(1), help="Nodes the ranks lie on.  [as many as the hardware's size takes]")
@click.option("--slots", type=click.IntRange(1), help="Experts a rank may hold.  [experts / ranks, rounded up]")
@click.option("--batch", type=click.IntRange(1), required=True, help="Sequences in one decode step, all ranks together.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, help="Tokens each sequence attends.")
@click.option("--zipf", type=Finite(), help="Popularity of experts: share of the i-th proportional to i^-ZIPF.")
@click.option("--loads", type=click.Path(exists=True, dir_okay=False),
              help="Tokens or shares of each expert: JSON or CSV, one row a layer.")
@click.option("--coactivation", type=click.Path(exists=True, dir_okay=False),
              help="Tokens that choose both of two experts: a square JSON or CSV, in the unit of --loads, one layer.")
@click.option("--samples", type=click.IntRange(1), default=4096, show_default=True, help="Routed tokens drawn per layer.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draw.")
@click.option("--weight-dtype", "--quantization", "weight_dtype", help="Weight format.  [the checkpoint's]")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang, trtllm.")
@click.option("--exact", is_flag=True, help="Solve the integer program however large.")
@click.option("--solver", type=click.Choice(["highs", "cbc"]), default="highs", show_default=True)
@common_options
def place_experts(
    model: str, hardware: str, ranks: int, nodes: int | None, slots: int | None, batch: int, context: int,
    zipf: float | None, loads: str | None, coactivation: str | None, samples: int, seed: int,
    weight_dtype: str | None, engine: str, exact: bool, solver: str, as_json: bool,
) -> None:  # fmt: skip
    """Place experts on ranks so that the slowest rank is fast and few tokens cross nodes.

    \b
    perfmodel place experts --model deepseek-v3 --hw hgx-h100-8 --ep 64 --slots 5 --batch 4096 --zipf 0.5
    """
    from perfmodel.estimator import Estimator
    from perfmodel.planner.placement import experts
    from perfmodel.planner.placement.routing import Layer

    e = Estimator(model, hardware, dp=ranks, ep=ranks, weight_dtype=weight_dtype, engine=engine)
    layer = Layer.of(e, float(batch))
    nodes = -(-ranks // min(e.machine.devices_per_node, ranks)) if nodes is None else nodes
    slots = -(-layer.moe.experts // ranks) if slots is None else slots
    results = []
    for i, (demand, choices) in enumerate(_demands(layer, zipf, loads, coactivation, samples, seed)):
        where = layer.ranks(demand, ranks, slots, nodes)
        best = experts.place(demand, where, exact=exact or None, solver=solver)
        start = experts.evaluate(experts.contiguous(demand, where), demand, where, best.bound, "contiguous")
        # A slot more need not be filled.
        wider = min(best, experts.place(demand, layer.ranks(demand, ranks, slots + 1, nodes), exact=False),
                    key=lambda p: p.objective)  # fmt: skip
        rows = [_row(p, demand, choices, where, layer, context) for p in (start, best, wider)]
        results.append({
            "layer": i, "before": rows[0], "after": rows[1], "one_more_slot": rows[2], "bound_s": best.bound,
            "gap": best.gap, "method": best.method, "seconds": best.seconds, "binding": _binding(best, demand, where),
            "per_token_s": where.per_token, "per_expert_s": where.per_expert, "per_copy_s": where.per_copy,
            "ranks": [[int(x) for x in best.held[:, g].nonzero()[0]] for g in range(ranks)],
        })  # fmt: skip
    data = {"model": e.model.name, "hardware": hardware, "nodes": nodes, "slots": slots, "layers": results}
    if as_json:
        echo_json(data)
    else:
        click.echo(_page(data))


def _demands(
    layer: Layer, zipf: float | None, loads: str | None, coactivation: str | None, samples: int, seed: int
) -> list[tuple[Demand, np.ndarray | None]]:
    """One demand per layer, with sampled choices where no co-activation is given."""
    import numpy as np

    from perfmodel.planner.placement import inputs, routing
    from perfmodel.planner.placement.experts import Demand
    from perfmodel.serving import prefix_laws

    if (zipf is None) == (loads is None):
        raise SpecError("give the experts' popularity: either --zipf or --loads")
    if coactivation is not None and loads is None:
        raise SpecError("--coactivation belongs to --loads")
    moe = layer.moe
    if zipf is not None:
        # Popular experts lie anywhere among the numbers.
        rows = np.random.default_rng(seed).permutation(prefix_laws.zipf(moe.experts, zipf))[None, :]
    else:
        rows = inputs.read_matrix(str(loads))
    if coactivation is None:
        return [routing.popularity_demand(row, moe, layer.tokens, samples, seed) for row in rows]
    if len(rows) != 1:
        raise SpecError(f"--coactivation is of one layer, and --loads has {len(rows)} rows")
    if rows.shape[1] != moe.experts:
        raise SpecError(f"{rows.shape[1]} expert loads for a model with {moe.experts} experts", file=loads)
    scale = layer.tokens * moe.top_k / rows.sum()
    return [(Demand(rows[0] * scale, moe.top_k, inputs.read_matrix(coactivation) * scale), None)]


def _row(
    p: Placed, demand: Demand, choices: np.ndarray | None, ranks: Ranks, layer: Layer, context: int
) -> dict[str, Any]:
    from perfmodel.planner.placement.routing import nodes_visited

    experts_s = layer.layer_seconds(p.held, demand)
    visited = 1.0
    if choices is not None:
        visited = nodes_visited(choices, p.held, ranks)
    elif ranks.nodes > 1:
        visited = p.copies / layer.tokens / (1 - 1 / ranks.nodes)
    return {
        "imbalance": p.imbalance, "rank_s": p.busiest, "copies": p.copies, "objective_s": p.objective,
        "nodes_per_token": visited, "replicas": int(p.held.sum()), "experts_s": experts_s,
        "tokens_per_s": layer.tokens_per_s(context, experts_s, visited, ranks),
    }  # fmt: skip


def _binding(p: Placed, demand: Demand, ranks: Ranks) -> str:
    """What keeps the slowest rank from being faster, in words with its numbers."""
    g = int(p.loads.argmax())
    share = demand.loads / p.replicas
    hot = int((share * p.held[:, g]).argmax())
    if p.imbalance < 1.05:
        return f"the mean: no rank has more than {p.imbalance - 1:.1%} above {p.loads.mean():,.0f} tokens"
    copies = f"{p.replicas[hot]} replica" + ("s" if p.replicas[hot] > 1 else "")
    text = f"rank {g}, {p.loads[g]:,.0f} tokens (mean {p.loads.mean():,.0f}): "
    text += f"expert {hot} alone brings {share[hot]:,.0f} with {copies}"
    if p.held.sum() == ranks.count * ranks.slots:
        return text + "; every slot is taken"
    saved = ranks.per_token * share[hot] / (p.replicas[hot] + 1)
    return text + (
        f"; one more would take {seconds(saved)} off each of its ranks, and a rank reads an expert in {seconds(ranks.per_expert)}"
    )


def _page(data: dict[str, Any]) -> str:
    lines = [f"{heading(data['model'])} on {data['hardware']}: {data['nodes']} nodes, {data['slots']} slots per rank"]
    for x in data["layers"]:
        rows = [["", "imbalance", "nodes/token", "experts, slowest rank", "program's objective", "tokens/s"]]
        for label, key in (("contiguous", "before"), ("placed", "after"), ("with one more slot", "one_more_slot")):
            r = x[key]
            rows.append([
                label, number(r["imbalance"]), number(r["nodes_per_token"]), seconds(r["experts_s"]),
                seconds(r["objective_s"]), number(r["tokens_per_s"], 4),
            ])  # fmt: skip
        lines += ["", heading(f"layer {x['layer']}"), table(rows, right=(1, 2, 3, 4, 5))]
        lines.append(f"  bound {seconds(x['bound_s'])}, gap {x['gap']:.2%} ({x['method']}, {seconds(x['seconds'])})")
        lines.append(f"  binding: {x['binding']}")
        spread = [f"{g}: {' '.join(map(str, held))}" for g, held in enumerate(x["ranks"])]
        lines += ["  experts by rank:", *(f"    {line}" for line in spread)] if len(spread) <= 16 else []
    return "\n".join(lines)
