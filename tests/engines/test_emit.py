"""Emitted commands against the engines' documented options, read back by the checker, and manifests by their structure."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from perfmodel.engines import kubernetes, shell
from perfmodel.engines.command import read
from perfmodel.engines.flags import documented, find, flags, gone
from perfmodel.engines.launch import launches
from perfmodel.engines.settings import settings
from perfmodel.errors import SpecError
from perfmodel.lint import lint
from perfmodel.spec.deployment import Deployment


def deployment(*pools: dict[str, Any], model: str = "llama-3.1-70b", **more: Any) -> Deployment:
    return Deployment.model_validate({"model": model, "pools": [{"hardware": "hgx-h100-8", **p} for p in pools], **more})


PLANS = {
    "one instance": deployment({"tp": 4, "chunk": 4096, "max_batch": 128}),
    "many": deployment({"tp": 4, "replicas": 6}, routing="prefix-affine", prefix_caching=True),
    "whole prompts": deployment({"tp": 8, "policy": "whole"}),
    "stages": deployment({"tp": 4, "pp": 2, "kv_dtype": "fp8"}),
    "apart": deployment({"role": "prefill", "tp": 4, "replicas": 2}, {"role": "decode", "tp": 8, "replicas": 2, "max_batch": 256}),
    "two nodes": deployment({"tp": 8, "pp": 2, "replicas": 2}, model="llama-3.1-405b"),
    "experts": deployment({"tp": 8, "ep": 8, "hardware": "hgx-h200-8"}, model="deepseek-v3"),
    "attention ranks": deployment({"dp": 8, "ep": 8, "hardware": "hgx-h200-8", "replicas": 2}, model="deepseek-v3"),
}
ENGINES = ("vllm", "sglang", "trtllm")


def _words(plan: Deployment, engine: str) -> list[list[str]]:
    """Every server command of a plan, leaders' and followers' options included."""
    found = []
    for launch in launches(plan, engine):
        for extra in ((), launch.leader, launch.follower):
            found.append([*launch.words, "--port", "8000", *extra])
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PLANS)
def test_every_emitted_option_is_documented_today(name: str, engine: str) -> None:
    spec = flags(engine)
    for words in _words(PLANS[name], engine):
        for word in words:
            if word.startswith("-") and not word[1:].isdigit() and word != "-m":
                option = find(spec, word)
                assert option is not None, word
                # Exactly as documented: not an abbreviation, not an option that is gone or going.
                assert word.lstrip("-") in (option.name, *(a.lstrip("-") for a in (*option.flag.aliases, *option.flag.negatives)),
                                            f"no-{option.name}"), word  # fmt: skip
                assert not gone(spec, option.flag), word
                assert not option.flag.deprecated, word


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PLANS)
def test_every_value_is_one_the_option_takes(name: str, engine: str) -> None:
    for words in _words(PLANS[name], engine):
        (command,) = read(shlex.join(w.replace("$NODE_RANK", "0") for w in words))
        assert settings(command).problems == []
    for launch in launches(PLANS[name], engine):
        for key, value in launch.options.items():
            assert key in flags(engine).options
            for nested in value if isinstance(value, dict) else ():
                assert f"{key}.{nested}" in flags(engine).options


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [n for n in PLANS if n != "two nodes"])
def test_the_checker_reads_back_the_plan(name: str, engine: str) -> None:
    """The command, read as a stranger's, has the plan's devices and no fault."""
    plan = PLANS[name]
    for launch in launches(plan, engine):
        (report,) = lint(shlex.join(launch.words), launch.pool.spec.hardware)
        assert report.fit is not None
        assert report.fit.devices == launch.pool.devices
        assert [f for f in report.findings if f.severity == "error"] == []
        (command,) = read(shlex.join(launch.words))
        found = settings(command)
        assert found.get("tp") == launch.pool.spec.tp * (launch.pool.spec.dp if engine != "vllm" else 1)
        assert found.get("pp", 1) == launch.pool.spec.pp
        if engine == "vllm":
            assert found.get("prefix_caching") is plan.prefix_caching
        if launch.pool.spec.policy == "chunked":
            assert found.get("step_tokens") == launch.pool.step_tokens


def test_a_plans_numbers_reach_the_line() -> None:
    for engine, batch, chunk in (("vllm", "--max-num-seqs 96", "--max-num-batched-tokens 3072"),
                                 ("sglang", "--max-running-requests 96", "--chunked-prefill-size 3072"),
                                 ("trtllm", "--max_batch_size 96", "--max_num_tokens 3072")):  # fmt: skip
        (launch,) = launches(deployment({"tp": 4, "max_batch": 96, "chunk": 3072}, mem_fraction=0.83), engine)
        line = " ".join(launch.words)
        assert batch in line
        assert chunk in line
        assert "0.83" in line


def test_prefill_and_decode_find_each_other() -> None:
    plan = PLANS["apart"]
    vllm = [json.loads(x.words[x.words.index("--kv-transfer-config") + 1]) for x in launches(plan, "vllm")]
    assert [x["kv_role"] for x in vllm] == ["kv_producer", "kv_consumer"]
    script = shell.script(launches(plan, "vllm"))
    # Two prefill instances share a node, so neither devices, ports nor side channels may meet.
    for unique in ("CUDA_VISIBLE_DEVICES=0,1,2,3", "CUDA_VISIBLE_DEVICES=4,5,6,7", "SIDE_CHANNEL_PORT=5600", "SIDE_CHANNEL_PORT=5601",
                   "--port 8000", "--port 8001"):  # fmt: skip
        assert script.count(unique) == 1
    router = shell.router_words(launches(plan, "sglang"), 7999)
    assert router is not None
    assert router.count("--prefill") == router.count("--decode") == 2
    bootstrap = [router[i + 2] for i, w in enumerate(router) if w == "--prefill"]
    sglang = shell.script(launches(plan, "sglang"))
    assert all(sglang.count(f"--disaggregation-bootstrap-port {port}") == 1 for port in bootstrap)
    config = shell.disaggregated_config(launches(plan, "trtllm"), 7999)
    assert config is not None
    assert config["context_servers"] == {"num_instances": 2, "urls": ["prefill-0:8000", "prefill-0:8001"]}
    assert config["generation_servers"]["num_instances"] == 2


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", ["many", "apart"])
def test_router_options_are_the_routers(name: str, engine: str) -> None:
    spec = flags(engine)
    for words in (shell.router_words(launches(PLANS[name], engine), 7999),
                  shell.router_words(launches(PLANS[name], engine), 7999, {"colocated": ("a=b", "c=d")})):  # fmt: skip
        assert words is not None
        assert {w[2:] for w in words if w.startswith("--")} <= set(spec.router_flags)
        assert words[words.index("--policy") + 1] in spec.router_policies


@pytest.mark.parametrize("engine", ENGINES)
def test_formats_become_the_engines_names(engine: str) -> None:
    narrow = deployment({"tp": 8, "kv_dtype": "fp8"}, model="llama-3.1-8b")
    (launch,) = launches(narrow, engine)
    text = " ".join(launch.words) + json.dumps(launch.options)
    assert {"vllm": "--kv-cache-dtype fp8", "sglang": "--kv-cache-dtype fp8_e4m3", "trtllm": '"dtype": "fp8"'}[engine] in text
    # fp8 weights: vLLM and SGLang make them while loading, TensorRT-LLM takes the catalogue's checkpoint that has them.
    (launch,) = launches(deployment({"weight_dtype": "fp8"}, model="llama-3.1-8b"), engine)
    if engine == "trtllm":
        assert "FP8" in launch.words[1]
    else:
        assert "--quantization fp8" in " ".join(launch.words)
    # As the checkpoint stores them: nothing to say.
    (launch,) = launches(deployment({"weight_dtype": "bf16"}, model="llama-3.1-8b"), engine)
    assert "--quantization" not in launch.words


@pytest.mark.parametrize(("pool", "engine", "why"), [
    ({"ep": 2, "tp": 2}, "llama.cpp", "no expert parallelism"),
    ({"role": "prefill"}, "llama.cpp", "hand keys and values"),
    ({"tp": 4, "ep": 2, "hardware": "hgx-h200-8"}, "vllm", "over all"),
    ({"tp": 2, "dp": 4, "ep": 8}, "trtllm", "all ranks or none"),
    ({"policy": "static"}, "vllm", "static"),
    ({"policy": "split"}, "vllm", "--enable-pdmux"),
    ({"hardware": "mi300x-8"}, "trtllm", "not on mi300x"),
    ({"weight_dtype": "int4"}, "trtllm", "--checkpoint"),
])  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_with_the_reason(pool: dict[str, Any], engine: str, why: str) -> None:
    pools = [pool, {"role": "decode"}] if pool.get("role") == "prefill" else [pool]
    model = "deepseek-v3" if "ep" in pool else "llama-3.1-8b"
    with pytest.raises(SpecError, match=why):
        launches(deployment(*pools, model=model), engine)


def test_caches_of_two_formats_cannot_be_exchanged() -> None:
    with pytest.raises(SpecError, match="one kv_dtype"):
        launches(deployment({"role": "prefill", "tp": 8}, {"role": "decode", "tp": 8, "kv_dtype": "fp8"}), "vllm")


def test_encoders_are_known_to_those_they_serve() -> None:
    pools = ({"role": "encode", "replicas": 9}, {"tp": 4, "replicas": 2})
    encode, language = launches(deployment(*pools, model="qwen2.5-vl-72b"), "sglang")
    assert "--encoder-only" in encode.words
    at = language.words.index("--encoder-urls")
    # Eight on the first node, one on the second.
    assert language.words[at + 1 : at + 10] == (*(f"http://encode-0:{8000 + i}" for i in range(8)), "http://encode-1:8000")
    objects = list(yaml.safe_load_all(kubernetes.text([encode, language], "vl")))
    words = next(c["command"] for o in objects if o["metadata"]["name"] == "vl-engine" and "template" in o["spec"] for c in _containers(o))
    assert words[words.index("--encoder-urls") + 1] == "http://vl-encode:8000"
    assert {o["metadata"]["name"] for o in objects if o["kind"] == "Service"} >= {"vl-encode", "vl-engine"}
    with pytest.raises(SpecError, match="no encoder-only server"):
        launches(deployment(*pools, model="qwen2.5-vl-72b"), "trtllm")


def test_vllm_hears_of_embeddings_on_a_port_of_each_rank() -> None:
    """https://docs.vllm.ai/en/latest/features/mooncake_ec_connector_usage/"""
    encode, language = launches(deployment({"role": "encode", "replicas": 2}, {"tp": 4, "replicas": 2}, model="qwen2.5-vl-72b"), "vllm")
    sent, heard = (json.loads(x.words[x.words.index("--ec-transfer-config") + 1]) for x in (encode, language))
    assert (sent["ec_connector"], sent["ec_role"], heard["ec_role"]) == ("ECMooncakeConnector", "ec_producer", "ec_consumer")
    assert "--mm-encoder-only" in encode.words
    assert "--enable-mm-embeds" in language.words
    script = shell.script([encode, language])
    # Pool 2 stands 100 ports above pool 1; its second instance after the four ranks of the first.
    assert '"ec_port": 14679' in script
    assert '"ec_port": 14683' in script
    assert "--ec-consumer-zmq-addrs tcp://engine-0:14679,tcp://engine-0:14683" in script
    with pytest.raises(SpecError, match="fixed addresses"):
        kubernetes.text([encode, language], "vl")
    with pytest.raises(SpecError, match="takes 1"):
        launches(deployment({"role": "encode", "tp": 2}, {"tp": 4}, model="qwen2.5-vl-72b"), "vllm")


def test_only_pools_that_leave_their_images_to_encoders_hear_of_them() -> None:
    pools = ({"role": "encode"}, {"tp": 4, "encodes": True}, {"tp": 4, "encodes": False})
    _, alone, fed = launches(deployment(*pools, model="qwen2.5-vl-72b"), "sglang")
    assert "--encoder-urls" not in alone.words
    assert "--encoder-urls" in fed.words
    with pytest.raises(ValueError, match="needs an encode pool"):
        deployment({"tp": 4, "encodes": False}, model="qwen2.5-vl-72b")


def _containers(o: dict[str, Any]) -> list[dict[str, Any]]:
    spec = o["spec"]
    group = spec.get("leaderWorkerTemplate")
    if group:
        return [*group["leaderTemplate"]["spec"]["containers"], *group["workerTemplate"]["spec"]["containers"]]
    return list(spec["template"]["spec"]["containers"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PLANS)
def test_manifests_hold_together(name: str, engine: str) -> None:
    plan = PLANS[name]
    found = launches(plan, engine)
    if engine == "trtllm" and any(x.pool.nodes > 1 for x in found):
        with pytest.raises(SpecError, match="MPI"):
            kubernetes.text(found)
        return
    objects = list(yaml.safe_load_all(kubernetes.text(found)))
    kinds = [o["kind"] for o in objects]
    assert all(o["apiVersion"] and o["metadata"]["name"] for o in objects)
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    workloads = [o for o in objects if o["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet")]
    engines = [o for o in workloads if not o["metadata"]["name"].endswith("-router")]
    assert [o["spec"]["replicas"] for o in engines] == [p.replicas for p in plan.pools]
    for o, launch in zip(engines, found, strict=True):
        several = launch.pool.nodes > 1
        assert (o["kind"] == "LeaderWorkerSet") == several
        if several:
            assert o["spec"]["leaderWorkerTemplate"]["size"] == launch.pool.nodes == 2
        else:
            # A Deployment must select the labels of its own pods.
            labels = o["spec"]["template"]["metadata"]["labels"]
            assert o["spec"]["selector"]["matchLabels"].items() <= labels.items()
        containers = _containers(o)
        devices = sum(c["resources"]["limits"]["nvidia.com/gpu"] for c in containers)
        assert devices == launch.pool.devices
        for c in containers:
            assert c["image"]
            volumes = {m["name"] for m in c["volumeMounts"]}
            assert "/dev/shm" in {m["mountPath"] for m in c["volumeMounts"]}
            assert len(volumes) == len(c["volumeMounts"])
        probe = containers[0]["startupProbe"]
        # 141 GB over 10 Gbit/s are 113 s, and compilation comes on top.
        if plan.model == "llama-3.1-70b":
            assert probe["failureThreshold"] * probe["periodSeconds"] == pytest.approx(113 + 600, abs=10)
    services = [o for o in objects if o["kind"] == "Service"]
    assert len(services) == len(workloads)
    if name == "apart":
        assert any(o["metadata"]["name"] == "serve-router" for o in workloads)
        assert ("StatefulSet" in kinds) == (engine == "trtllm")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["one instance", "many", "apart", "experts"])
def test_the_checker_finds_no_fault_in_the_manifests(name: str, engine: str) -> None:
    plan = PLANS[name]
    text = kubernetes.text(launches(plan, engine))
    for report in lint(text, plan.pools[0].hardware):
        assert [f for f in report.findings if f.severity == "error"] == []


def test_shell_scripts_are_valid_shell() -> None:
    if shutil.which("sh") is None:
        pytest.skip("no shell")
    for engine in ENGINES:
        for plan in PLANS.values():
            subprocess.run(["sh", "-n"], input=shell.script(launches(plan, engine)), text=True, check=True)


def test_all_four_engines_are_documented() -> None:
    """Facts read in the manuals: a few names and defaults of each."""
    assert set(documented()) == {"vllm", "sglang", "trtllm", "llama.cpp"}
    for engine, name, kind, default in (
        ("vllm", "max-num-batched-tokens", "int", None), ("vllm", "gpu-memory-utilization", "float", 0.92),
        ("sglang", "disaggregation-bootstrap-port", "int", 8998), ("sglang", "max-prefill-tokens", "int", 16384),
        ("trtllm", "max_batch_size", "int", 2048), ("llama.cpp", "batch-size", "int", 2048), ("llama.cpp", "ubatch-size", "int", 512),
    ):  # fmt: skip
        flag = flags(engine).flags[name]
        assert (flag.kind, flag.default) == (kind, default), name
    assert flags("trtllm").options["kv_cache_config.tokens_per_block"].default == 32
    for engine in documented():
        words = [w for n, f in flags(engine).flags.items() for w in (f"--{n}", *f.aliases, *f.negatives)]
        assert len(words) == len(set(words)), engine
