"""Output of other people's benchmarks as rows of the tidy format.

Known: `vllm bench serve` and `vllm bench latency` (JSON), SGLang's bench_serving and bench_one_batch (JSONL), AIPerf and
GenAI-Perf (profile export, JSON), llama-bench (JSON, JSONL, CSV). What a file does not say (the hardware, mostly) is given
beside it. To read another format, write a reader and add it to READERS.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perfmodel.errors import SpecError

Record = dict[str, Any]
COLUMNS = (
    "hardware", "n_devices", "model", "dtype", "kv_dtype", "phase", "batch", "input_len", "output_len", "context_len", "tp",
    "pp", "ep", "dp", "engine", "engine_version", "protocol", "requests_per_client", "metric", "value", "unit", "std", "flag",
    "measured", "source_path",
)  # fmt: skip
_DEGREES = ("tp", "pp", "dp", "ep")


def ingest(path: str | Path, given: Mapping[str, Any]) -> list[Record]:
    """Rows of one result file; `given` (hardware, model, tp …) fills what the file leaves out and overrides what it says.

    Raises SpecError for a file of no known format, and for a row that lacks its hardware, model or lengths.
    """
    path = Path(path)
    records = _records(path)
    rows = []
    for record in records:
        reader = next((read for knows, read in READERS if knows(record)), None)
        if reader is None:
            raise SpecError(
                "no benchmark output that is known here: vllm bench serve or latency, SGLang bench_serving or bench_one_batch, "
                "AIPerf or GenAI-Perf, llama-bench",
                file=str(path),
            )
        rows += reader(record)
    chosen = {k: v for k, v in given.items() if v is not None}
    for row in rows:
        row |= chosen
        row |= {k: row.get(k) or 1 for k in _DEGREES} | {"source_path": path.name}
        row.setdefault("n_devices", row["tp"] * row["pp"] * row["dp"])
        _complete(row, path)
    return rows


def _records(path: Path) -> list[Record]:
    """The JSON objects of a file: one, a list, or one a line; for CSV its rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read it: {error}", file=str(path)) from None
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    try:
        data = json.loads(text)
        return list(data) if isinstance(data, list) else [data]
    except json.JSONDecodeError:
        pass
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SpecError(
                    f"neither JSON nor one JSON object a line: {error.msg}", file=str(path), line=number
                ) from None
    if not found or not all(isinstance(x, dict) for x in found):
        raise SpecError("no JSON objects in it", file=str(path))
    return found


def _complete(row: Record, path: Path) -> None:
    options = {"hardware": "--hw", "model": "--model", "input_len": "--input-len", "batch": "--batch"}
    for column, option in options.items():
        if not row.get(column):
            raise SpecError(f"the file does not say the {column.replace('_', ' ')}; give {option}", file=str(path))


def _vllm_serve(r: Record) -> list[Record]:
    """One run of `vllm bench serve --save-result`: closed loop of max_concurrency clients."""
    completed = max(float(r.get("completed", 0)), 1)
    concurrency = r.get("max_concurrency") or r.get("concurrency")
    shared = {
        "model": r.get("model_id"), "engine": r.get("backend") or r.get("endpoint_type") or "vllm",
        "batch": concurrency, "input_len": _whole(r.get("total_input_tokens"), completed),
        "output_len": _whole(r.get("total_output_tokens"), completed), "measured": r.get("date"),
        "requests_per_client": _whole(completed, float(concurrency)) if concurrency else None,
    }  # fmt: skip
    if str(shared["engine"]).startswith("openai"):
        shared["engine"] = "vllm"
    if str(r.get("request_rate", "inf")) not in ("inf", "None"):
        raise SpecError(
            f"an open loop at {r['request_rate']} requests/s; only runs with request rate inf are comparable"
        )
    return _closed_loop(shared, r)


def _closed_loop(shared: Record, r: Record) -> list[Record]:
    shared = shared | {"protocol": "closed-loop"}
    rows = []
    for phase, metric, key in (("prefill", "ttft", "mean_ttft_ms"), ("decode", "tpot", "mean_tpot_ms")):
        if r.get(key):
            std = r.get(key.replace("mean", "std"))
            rows.append({**shared, "phase": phase, "metric": metric, "value": float(r[key]), "unit": "ms", "std": std})
    if r.get("output_throughput"):
        value = float(r["output_throughput"])
        rows.append({**shared, "phase": "e2e", "metric": "output_throughput", "value": value, "unit": "tok/s"})
    return rows


def _vllm_latency(r: Record) -> list[Record]:
    """One run of `vllm bench latency`: seconds of a whole static batch; the file holds no configuration."""
    return [
        {
            "engine": "vllm",
            "protocol": "static",
            "phase": "e2e",
            "metric": "e2e_latency",
            "value": float(r["avg_latency"]),
            "unit": "s",
        }
    ]


def _sglang_serving(r: Record) -> list[Record]:
    """One line of bench_serving; lengths are means of what was sent, degrees those the server reports."""
    completed = max(float(r.get("completed", 0)), 1)
    server = r.get("server_info") or {}
    concurrency = r.get("max_concurrency")
    shared = {
        "engine": "sglang" if str(r.get("backend", "sglang")).startswith("sglang") else r["backend"], "batch": concurrency,
        "model": server.get("model_path"), "engine_version": server.get("version"), "tp": server.get("tp_size"),
        "dp": server.get("dp_size"), "ep": server.get("ep_size"), "pp": server.get("pp_size"),
        "input_len": _whole(r.get("total_input_tokens"), completed),
        "output_len": _whole(r.get("total_output_tokens"), completed),
        "requests_per_client": _whole(completed, float(concurrency)) if concurrency else None,
    }  # fmt: skip
    return _closed_loop(shared, r)


def _sglang_batch(r: Record) -> list[Record]:
    """One line of bench_one_batch: prefill of a batch, then its decode steps."""
    shared = {
        "engine": "sglang", "protocol": "static", "batch": r.get("batch_size"), "input_len": r.get("input_len"),
        "output_len": r.get("output_len"),
    }  # fmt: skip
    prefill, step = float(r["prefill_latency"]), float(r["median_decode_latency"])
    return [
        {**shared, "phase": "prefill", "metric": "ttft", "value": prefill * 1e3, "unit": "ms"},
        {**shared, "phase": "decode", "metric": "tpot", "value": step * 1e3, "unit": "ms"},
    ]


def _aiperf(r: Record) -> list[Record]:
    """A profile export of AIPerf or GenAI-Perf: averages with their units."""
    config = r.get("input_config") or {}

    def mean(name: str, key: str = "avg") -> float | None:
        block = r.get(name)
        return float(block[key]) if isinstance(block, dict) and block.get(key) is not None else None

    model = _find(config, "model_names") or _find(config, "model") or _find(config, "models")
    while isinstance(model, (list, dict)) and model:
        model = model[0] if isinstance(model, list) else model.get("name") or model.get("items")
    concurrency = _find(config, "concurrency")
    shared = {
        "model": model, "engine": _find(config, "server") or "vllm", "batch": concurrency, "protocol": "closed-loop",
        "input_len": _whole(mean("input_sequence_length"), 1), "output_len": _whole(mean("output_sequence_length"), 1),
    }  # fmt: skip
    names = (("prefill", "ttft", "time_to_first_token"), ("decode", "tpot", "inter_token_latency"))
    rows = []
    for phase, metric, name in names:
        value = mean(name)
        if value is not None:
            rows.append(
                {
                    **shared,
                    "phase": phase,
                    "metric": metric,
                    "value": value,
                    "unit": r[name].get("unit", "ms"),
                    "std": mean(name, "std"),
                }
            )
    throughput = mean("output_token_throughput")
    if throughput is not None:
        rows.append({**shared, "phase": "e2e", "metric": "output_throughput", "value": throughput, "unit": "tok/s"})
    return rows


_GGUF = {"f16": "fp16", "bf16": "bf16", "f32": "fp32", "q8_0": "q8_0", "q6_k": "q6_k", "q5_k": "q5_k", "q4_k": "q4_k"}


def _llama_bench(r: Record) -> list[Record]:
    """One test of llama-bench: prompt processing (pp) as time to first token, generation (tg) as time per token."""
    prompt, generated, depth = (int(float(r.get(k) or 0)) for k in ("n_prompt", "n_gen", "n_depth"))
    seconds, spread = float(r["avg_ns"]) / 1e9, float(r.get("stddev_ns") or 0) / 1e9
    quantised = re.search(r"\b(bf16|f16|f32|q\d_k|q\d_\d)\b", str(r.get("model_type", "")).lower().replace("all ", ""))
    shared = {
        "engine": "llama.cpp", "engine_version": r.get("build_number") or r.get("build_commit"), "protocol": "static", "batch": 1,
        "dtype": _GGUF.get(quantised.group(1)) if quantised else None, "kv_dtype": _GGUF.get(str(r.get("type_k", "")).lower()),
        "measured": r.get("test_time"),
    }  # fmt: skip
    if prompt and not generated:
        cells = {
            "phase": "prefill",
            "metric": "ttft",
            "input_len": prompt,
            "output_len": 1,
            "context_len": prompt + depth,
        }
        return [{**shared, **cells, "value": seconds * 1e3, "unit": "ms", "std": spread * 1e3}]
    if generated and not prompt:
        cells = {"phase": "decode", "metric": "tpot", "input_len": max(depth, 1), "output_len": generated}
        return [{**shared, **cells, "value": seconds / generated * 1e3, "unit": "ms", "std": spread / generated * 1e3}]
    cells = {"phase": "e2e", "metric": "e2e_latency", "input_len": prompt, "output_len": generated}
    return [{**shared, **cells, "value": seconds, "unit": "s", "std": spread}]


def _whole(total: Any, parts: float) -> int | None:
    return None if total is None else round(float(total) / parts)


def _find(tree: Any, name: str) -> Any:
    """First value under a key anywhere in nested dictionaries."""
    if isinstance(tree, dict):
        if tree.get(name) is not None:
            return tree[name]
        return next((x for v in tree.values() if (x := _find(v, name)) is not None), None)
    return None


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda r: all(k in r for k in keys)


# The first whose keys are all there reads the record.
READERS: tuple[tuple[Callable[[Record], bool], Callable[[Record], list[Record]]], ...] = (
    (_has("n_prompt", "n_gen", "avg_ns"), _llama_bench),
    (_has("prefill_latency", "median_decode_latency"), _sglang_batch),
    (_has("avg_latency", "percentiles"), _vllm_latency),
    (_has("mean_ttft_ms", "random_input_len"), _sglang_serving),
    (_has("mean_ttft_ms", "completed"), _vllm_serve),
    (_has("time_to_first_token", "output_token_throughput"), _aiperf),
)


def write(rows: list[Record], path: Path) -> None:
    """Write rows as a tidy CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(cells)
