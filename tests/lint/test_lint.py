"""Seeded mistakes are found, published recipes raise no alarm, numbers agree with hand arithmetic, better lines are better."""

from __future__ import annotations

import contextlib
import re

import pytest
import yaml
from engine_commands import BAD, GOOD, LLAMA8, LLAMA70, SGLANG, Bad, Good, pod

from perfmodel.engines.flags import flags
from perfmodel.errors import PerfmodelError, SpecError
from perfmodel.estimates import estimate
from perfmodel.lint import Report, lint


def one(text: str, hardware: str | None = "hgx-h100-8", **more: object) -> Report:
    (report,) = lint(text, hardware, **more)  # type: ignore[arg-type]
    return report


def codes(report: Report) -> list[str]:
    return [f.code for f in report.findings]


def run(bad: Bad) -> Report:
    return one(bad.text, bad.hardware, lengths=bad.lengths, rate=bad.rate, version=bad.version)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.code)
def test_seeded_mistakes_are_found(bad: Bad) -> None:
    found = next((f for f in run(bad).findings if f.code == bad.code), None)
    assert found is not None
    assert found.severity in ("error", "warning")
    assert len(found.message) > 25  # it says why


def test_there_are_enough_seeded_mistakes_over_all_engines() -> None:
    assert len(BAD) >= 40
    for word in ("vllm serve", "sglang.launch_server", "trtllm-serve", "llama-server", "kind: Deployment"):
        assert any(word in b.text for b in BAD)


@pytest.mark.parametrize("good", GOOD, ids=lambda g: g.text.strip()[:60])
def test_published_recipes_raise_no_alarm(good: Good) -> None:
    report = one(good.text, good.hardware)
    assert report.fit is not None
    assert [f for f in report.findings if f.severity != "info"] == []
    assert report.better is None


@pytest.mark.parametrize("bad", [b for b in BAD if b.hardware], ids=lambda b: b.code)
def test_a_better_line_has_fewer_faults(bad: Bad) -> None:
    """What can be changed by itself is; what only a person can decide stays reported."""
    report = run(bad)
    if report.better is None:
        return
    after = one(report.better, bad.hardware, lengths=bad.lengths, rate=bad.rate)
    grave = [f for f in report.findings if f.severity != "info"]
    assert len([f for f in after.findings if f.severity != "info"]) < len(grave)


def test_most_better_lines_have_no_fault_left() -> None:
    clean = 0
    for bad in BAD:
        report = run(bad) if bad.hardware else None
        if report is not None and report.better is not None:
            clean += one(report.better, bad.hardware, lengths=bad.lengths).worst in (None, "info")
    assert clean >= 24


def test_weights_and_cache_by_hand() -> None:
    """Llama 3.1 70B: 70.55 G parameters x 2 bytes over 4 devices; a token is 80 layers x 2 x 8 heads x 128 x 2 bytes."""
    fit = one(f"vllm serve {LLAMA70} -tp 4 --max-model-len 8192").fit
    assert fit is not None
    assert fit.weights == pytest.approx(70.553706496e9 * 2 / 4, rel=0.01)
    token = 80 * 2 * 8 * 128 * 2 / 4
    assert fit.kv_tokens == pytest.approx(fit.kv_pool / token, rel=0.01)
    assert fit.concurrency_at_context == pytest.approx(fit.kv_tokens / 8192, rel=0.01)
    # Everything together is the share of the device that was asked for (0.92 by default), graphs aside.
    parts = fit.weights + fit.activations + fit.overhead + fit.kv_pool
    assert parts == pytest.approx(0.92 * fit.visible, rel=0.03)


def test_twice_the_context_halves_the_concurrency() -> None:
    short, long = (one(f"vllm serve {LLAMA8} --max-model-len {n}").fit for n in (8192, 16384))
    assert short is not None
    assert long is not None
    assert long.concurrency_at_context == pytest.approx(short.concurrency_at_context / 2, rel=0.02)


def test_an_8_bit_cache_doubles_the_tokens() -> None:
    plain, narrow = (one(f"vllm serve {LLAMA8} --kv-cache-dtype {n}").fit for n in ("auto", "fp8"))
    assert plain is not None
    assert narrow is not None
    assert narrow.kv_tokens == pytest.approx(2 * plain.kv_tokens, rel=0.01)


def test_a_low_fraction_wastes_what_it_says() -> None:
    """From 0.5 to the usual 0.9 of what the device shows."""
    report = one(f"vllm serve {LLAMA8} --gpu-memory-utilization 0.5")
    found = next(f for f in report.findings if f.code == "fraction-too-low")
    assert report.fit is not None
    assert found.number == pytest.approx(0.4 * report.fit.visible, rel=1e-6)


def test_the_probe_is_compared_with_the_weights() -> None:
    """141.1 GB over 1.25 GB/s are 113 s: a probe of 30 s kills the pod, one of 150 s does not."""
    probe = "\n        livenessProbe: {{httpGet: {{path: /health, port: 8000}}, periodSeconds: 10, failureThreshold: {}}}"
    command = f"vllm serve {LLAMA70} --tensor-parallel-size 4"
    short = one(pod(command, probe=probe.format(3)), None)
    found = next(f for f in short.findings if f.code == "probe-too-short")
    assert found.number == pytest.approx(141.1 / 1.25 - 30, abs=2)
    assert "probe-too-short" not in codes(one(pod(command, probe=probe.format(15)), None))


def test_what_binds_moves_with_the_limits() -> None:
    few = one(f"vllm serve {LLAMA8} --max-model-len 4096 --max-num-seqs 8").fit
    long = one(f"vllm serve {LLAMA8}").fit
    assert few is not None
    assert long is not None
    assert (few.binding, long.binding) == ("scheduler", "memory")


def test_the_engines_version_decides_what_is_known() -> None:
    command = f"vllm serve {LLAMA70} -tp 4 --swap-space 16 --num-scheduler-steps 8"
    newest = codes(one(command))
    assert newest.count("gone-option") == 2
    before = one(command, version="0.8.5")
    assert "gone-option" not in codes(before)
    assert "swap-unused" in codes(before)  # it was taken, and did nothing
    # The default share was 0.9 before 0.2x and is 0.92 today.
    shares = [one(f"vllm serve {LLAMA8}", version=v).fit for v in ("0.9.2", "0.33.0")]
    used = [(f.weights + f.activations + f.overhead + f.kv_pool) / f.visible for f in shares if f]
    assert used == pytest.approx([0.9, 0.92], abs=0.004)
    assert "gone-option" in codes(one(f"vllm serve {LLAMA70} -tp 4 --kv-cache-memory-bytes 10G", version="0.6.6"))


@pytest.mark.parametrize(("typed", "meant"), [
    ("--tensor-paralel-size", "--tensor-parallel-size"), ("--max-model-length", "--max-model-len"),
    ("--gpu-memory-utilisation", "--gpu-memory-utilization"), ("--enable-prefix-cachng", "--enable-prefix-caching"),
])  # fmt: skip
def test_misspelt_options_are_named_and_put_right(typed: str, meant: str) -> None:
    value = {"--enable-prefix-cachng": ""}.get(typed, " 4096" if "len" in typed else " 0.9" if "gpu" in typed else " 2")
    report = one(f"vllm serve {LLAMA8} {typed}{value}")
    found = next(f for f in report.findings if f.code == "unknown-option")
    assert meant in found.message
    assert report.better is not None
    assert meant in report.better


def test_as_the_engine_reads_its_line() -> None:
    """Underscores, abbreviations, `=`, whole numbers with letters and dotted keys are no mistakes."""
    assert one(f"vllm serve {LLAMA8} --max_model_len=8k --kv-transfer-config.kv_connector NixlConnector "
               "--kv-transfer-config.kv_role kv_both -O3 --disable-log-requests --tensor 2").worst in (None, "info")
    # SGLang's parser knows dashes only.
    assert "unknown-option" in codes(one(f"{SGLANG} {LLAMA8} --mem_fraction_static 0.85"))
    report = one(f"python3.12 -m sglang.launch_server --model {LLAMA8} --tp 2 --mem-frac 0.85")
    assert report.worst in (None, "info")
    assert report.fit is not None
    assert report.fit.devices == 2


def test_a_manifest_names_its_node_and_its_options_file() -> None:
    command = pod("trtllm-serve nvidia/Llama-3.3-70B-Instruct-FP8 --host 0.0.0.0 --tp_size 4 --extra_llm_api_options /etc/o/o.yaml")
    command = command.replace("[{name: shm, mountPath: /dev/shm}]", "[{name: shm, mountPath: /dev/shm}, {name: o, mountPath: /etc/o}]")
    command = command.replace("volumes: [", "volumes: [{name: o, configMap: {name: opts}}, ")
    options = "kind: ConfigMap\napiVersion: v1\nmetadata: {name: opts}\ndata:\n  o.yaml: |\n    kv_cache_cofig: {dtype: fp8}\n"
    report = one(f"{command}---\n{options}", None)
    assert report.hardware == "hgx-h100-8"
    assert "unknown-key" in codes(report)
    fixed = one(f"{command}---\n{options.replace('cofig', 'config')}", None)
    assert fixed.worst in (None, "info")


def test_an_unknown_model_still_gets_its_spelling_checked() -> None:
    report = one("vllm serve acme/secret-7b --tensr-parallel-size 2")
    assert report.fit is None
    assert codes(report) == ["unknown-option", "not-computed"]
    assert one("vllm serve acme/secret-7b", model="llama-3.1-8b").fit is not None


@pytest.mark.parametrize("text", ["", "ls -la", "vllm bench serve x", "vllm serve 'x", "apiVersion: v1\nkind: Service\nmetadata: {name: a}"])
def test_no_command_is_one_clear_error(text: str) -> None:
    with pytest.raises(SpecError):
        lint(text, "hgx-h100-8")


def test_broken_yaml_names_the_line() -> None:
    with pytest.raises(SpecError, match=re.escape(":3:")):
        lint("apiVersion: v1\nkind: Pod\nspec: [}\n")


def test_the_checker_and_the_estimate_count_alike() -> None:
    fit = one(f"vllm serve {LLAMA70} -tp 4 --gpu-memory-utilization 0.9 --max-num-seqs 1024").fit
    said = estimate(model="llama-3.1-70b", hardware="hgx-h100-8", tp=4, mem_fraction=0.9, price=1.0)["memory"]
    assert fit is not None
    assert fit.kv_tokens == pytest.approx(said["kv_tokens"], rel=0.01)
    assert fit.weights == pytest.approx(said["weights"])


STARTS = {"vllm": f"vllm serve {LLAMA8}", "sglang": f"{SGLANG} Qwen/Qwen3-30B-A3B", "trtllm": f"trtllm-serve {LLAMA8}",
          "llama.cpp": "llama-server -m Qwen3-8B-Q4_K_M.gguf"}  # fmt: skip


@pytest.mark.parametrize("engine", STARTS)
def test_no_value_of_a_setting_ends_in_a_traceback(engine: str) -> None:
    """Zero, a negative number, a word and nothing at all for every option that decides something."""
    for name, flag in flags(engine).flags.items():
        for value in ("-1", "x", None) if flag.sets else ():
            line = f"{STARTS[engine]} --{name}" + (f" '{value}'" if value is not None else "")
            with contextlib.suppress(PerfmodelError):
                assert len(lint(line, "hgx-h100-8")) == 1


@pytest.mark.parametrize("bad", [None, "x", 5, [None], {"a": 1}])
def test_no_manifest_ends_in_a_traceback(bad: object) -> None:
    def places(o: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        inner = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()
        return [*([path] if path else []), *(p for k, v in inner for p in places(v, (*path, k)))]

    text = pod(f"vllm serve {LLAMA8}", gpus=1, probe="\n        livenessProbe: {httpGet: {path: /health, port: 8000}}")
    for path in places(yaml.safe_load(text)):
        document = yaml.safe_load(text)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = bad
        with contextlib.suppress(PerfmodelError):
            assert lint(yaml.safe_dump(document), "hgx-h100-8")


def test_a_script_gets_one_report_for_each_server() -> None:
    script = f"export A=1\nCUDA_VISIBLE_DEVICES=0,1 vllm serve {LLAMA8} -tp 2 --port 8100 &\nvllm serve {LLAMA8} --port 8200 > log 2>&1 &\n"
    reports = lint(script, "hgx-h100-8")
    assert [r.fit.devices for r in reports if r.fit] == [2, 1]
    # Two devices are visible: four are too many.
    assert "too-many-devices" in codes(one(f"CUDA_VISIBLE_DEVICES=0,1 vllm serve {LLAMA8} -tp 4"))
