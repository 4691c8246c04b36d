"""perfmodel models: what the catalogue and config.json files say about models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import Verbs, common_options, help_if_alone
from perfmodel.cli.text import echo_json, heading, number, size, table, tally

if TYPE_CHECKING:
    from perfmodel.spec.model import Block, Model


@click.group(cls=Verbs, verbs={"list": f"{__name__}:list_models", "show": f"{__name__}:show"})
@click.pass_context
def models(context: click.Context) -> None:
    """List the catalogue's models, or show one."""
    help_if_alone(context)


@click.command("list")
@common_options
def list_models(as_json: bool) -> None:
    """Every model of the catalogue."""
    from perfmodel import catalog
    from perfmodel.parameters import parameters_active, parameters_total

    found: list[dict[str, Any]] = []
    for name in catalog.names("models"):
        m = catalog.load_model(name)
        total, active = parameters_total(m), parameters_active(m)
        found.append(
            {
                "name": name, "title": m.title, "organisation": m.organisation, "family": m.family,
                "parameters_total": total, "parameters_active": active, "layers": m.n_layers,
                "max_positions": m.max_positions, "dtype": m.dtype, "expert_dtype": m.expert_dtype,
            }
        )  # fmt: skip
    if as_json:
        echo_json(found)
        return
    rows = [["name", "parameters", "active", "layers", "context", "dtype", "from"]]
    for x in found:
        meets = tally(x["parameters_active"]) if x["parameters_active"] != x["parameters_total"] else ""
        context = f"{x['max_positions']:,}" if x["max_positions"] else "any"
        sizes = [tally(x["parameters_total"]), meets, str(x["layers"]), context]
        dtype = x["dtype"] + (f" + {x['expert_dtype']}" if x["expert_dtype"] else "")
        rows.append([x["name"], *sizes, dtype, x["organisation"]])
    click.echo(table(rows, right=(1, 2, 3, 4), indent=0))


@click.command()
@click.argument("name", metavar="NAME|CONFIG.JSON|FOLDER")
@common_options
def show(name: str, as_json: bool) -> None:
    """Parameters, shapes and bytes of one model, against the published count."""
    from perfmodel import catalog

    model = catalog.load_model(name)
    data = describe(model)
    if as_json:
        echo_json(data)
    else:
        click.echo(page(model, data))


def describe(model: Model) -> dict[str, Any]:
    """What a model is and stores, sizes in bytes."""
    from perfmodel import memory
    from perfmodel.ops.shard import Parallelism, checkpoint_formats
    from perfmodel.parameters import parameters_active, parameters_total

    formats = checkpoint_formats(model)
    total = parameters_total(model)
    published = model.published
    gap = total - published.total if published else None
    counts = model.block_counts()
    return {
        "name": model.name,
        "title": model.title,
        "organisation": model.organisation,
        "family": model.family,
        "parameters_total": total,
        "parameters_active": parameters_active(model),
        "published": published.model_dump() if published else None,
        "difference": gap,
        "difference_relative": gap / published.total if published and gap is not None else None,
        "mtp_parameters": model.mtp_parameters,
        "layers": model.n_layers,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "max_positions": model.max_positions,
        "tied_embeddings": model.tied_embeddings,
        "dtype": model.dtype,
        "expert_dtype": model.expert_dtype,
        "kv_dtype": formats.kv.name,
        "weight_bytes": float(memory.weight_bytes(model, Parallelism(), formats)),
        "kv_bytes_per_token": memory.kv_bytes_per_token(model, formats),
        "state_bytes_per_sequence": memory.state_bytes_per_sequence(model, formats),
        "blocks": {k: {"layers": n, **model.blocks[k].model_dump()} for k, n in counts.items()},
        "sources": {k: s.model_dump() for k, s in model.sources.items()},
        "notes": list(model.notes),
    }


def page(model: Model, data: dict[str, Any]) -> str:
    """One model as text."""
    title = " ".join(x for x in (data["title"], f"by {data['organisation']}" if data["organisation"] else "") if x)
    total, active = data["parameters_total"], data["parameters_active"]
    rows = [["parameters", tally(total), f"{total:,}, tied embeddings once"]]
    if active != total:
        rows.append(["  active per token", tally(active), f"{active:,}"])
    if p := data["published"]:
        exact = "exact" if p["exact"] else f"rounded, within {p['tolerance']:.0%}"
        gap = "equal" if data["difference"] == 0 else f"ours differs by {data['difference']:+,}"
        rows.append(["  published", tally(p["total"]), f"{p['total']:,} ({exact}; {p['source']}); {gap}"])
    if data["mtp_parameters"]:
        rows.append(["  beside them", tally(data["mtp_parameters"]), "in multi-token-prediction modules"])
    formats = data["dtype"] + (f", experts {data['expert_dtype']}" if data["expert_dtype"] else "")
    rows.append(["weights", size(data["weight_bytes"]), f"as the checkpoint stores them, mostly {formats}"])
    if model.denoises:
        each = f", {model.token_edge} x {model.token_edge} pixels each" if model.token_edge else ""
        rows.append(["denoises", f"{model.denoises}s", f"all tokens in every step{each}"])
    elif kv := data["kv_bytes_per_token"]:
        rows.append(["KV cache", f"{size(kv)} per token", f"{kv:,.0f} B in {data['kv_dtype']}, all layers"])
    if state := data["state_bytes_per_sequence"]:
        rows.append(["state", f"{size(state)} per sequence", "recurrent layers"])
    longest = f"{data['max_positions']:,}" if data["max_positions"] else "unlimited"
    tied = ", tied to the head" if data["tied_embeddings"] else ""
    rows.append(["hidden size", f"{data['hidden']:,}"])
    rows.append(["vocabulary", f"{data['vocab']:,}{tied}"])
    rows.append(["positions", longest])
    layers = [[f"{n} x {name}", _block(model.blocks[name])] for name, n in model.block_counts().items()]
    name = f"{model.name}: {title}" if title else model.name
    text = f"{heading(name)}\n{table(rows)}\n\n{heading(f'{model.n_layers} layers')}\n{table(layers)}"
    if model.vision:
        text += f"\n  vision encoder: {model.vision.layers} layers, {tally(model.vision.parameters)} parameters"
    notes = [f"  {k}: {s.title}" + (f", {s.url}" if s.url else "") for k, s in model.sources.items()]
    notes += [f"  {note}" for note in model.notes]
    return text + (f"\n\n{heading('Sources and notes')}\n" + "\n".join(notes) if notes else "")


def _block(block: Block) -> str:
    """A layer in a line: the kind of each half and its sizes that are not zero."""
    cross = [f"cross-attention: {_pairs(block.cross)}"] if block.cross else []
    parts = [*([_record(block.mixer)] if block.mixer else []), *cross, *([_record(block.ffn)] if block.ffn else [])]
    return "; ".join(parts) or "empty"


def _record(record: Any) -> str:
    sizes = [
        key.replace("_", " ") if value is True else f"{key.replace('_', ' ')} {_shown(value)}"
        for key, value in record
        if key != "kind" and value not in (None, False, 0, "none")
    ]
    return f"{record.kind}: {', '.join(sizes)}"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return number(value, digits=12)
    return f"({_pairs(value)})" if hasattr(value, "model_dump") else str(value)


def _pairs(record: Any) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in record)
