"""A small paper file that tests change one thing of."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "id": "example", "title": "An example", "family": "kv-quantization", "relation": "technique", "mechanism": "fewer bits",
    "parameters": {
        "model": {"value": "llama-2-7b", "from": "abstract"},
        "device": {"value": "a100-sxm-80gb", "from": "abstract"},
        "bits": {"value": 4, "unit": "bit", "from": "abstract"},
        "input": {"value": 2000, "unit": "token", "range": [1500, 2500], "from": "assumed", "reason": "a guess"},
        "output": {"value": 100, "unit": "token", "from": "paper", "source": "section 5"},
        "batch": {"value": 16, "from": "abstract"},
    },
    "settings": {
        "full": {"model": "=model", "hardware": "=device", "batch": "=batch", "input": "=input", "output": "=output"},
        "narrow": {"like": "full", "techniques": [{"kind": "kv-quantization", "bits": "=bits"}]},
    },
    "claims": [
        {"metric": "tpot", "claimed": 1.3, "unit": "x", "direction": "lower", "against": "16 bits", "setting": "decode",
         "predict": "full.tpot / narrow.tpot"},
    ],
}  # fmt: skip

SOME = """
id: some
title: Some
date: "2024-01"
arxiv: "2401.00001"
system: Some
family: scheduling-batching
relation: technique
mechanism: Some.
parameters:
  model: {value: llama-2-7b, from: paper, source: s}
  device: {value: a100-sxm-80gb, from: paper, source: s}
  input: {value: 800, from: paper, source: s}
  output: {value: 100, from: paper, source: s}
"""
"""The head of a file whose settings serve 800 + 100 tokens a request; parameters and settings follow."""
