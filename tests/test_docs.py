"""Pages printed by the code are current, and what the hand-written ones tell a reader to do works."""

from __future__ import annotations

import importlib.util
import re

import pytest

from perfmodel import catalog, memory
from perfmodel.estimator import Estimator
from perfmodel.ops.shard import Formats
from perfmodel.parameters import parameters_total
from perfmodel.spec.formats import get_format
from perfmodel.symbols import ALPHABET


@pytest.fixture(scope="module")
def pages(root):
    spec = importlib.util.spec_from_file_location("docs_generate", root / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("name", ["nomenclature.md", "equations.md", "hardware-schema.md"])
def test_committed_page_is_current(pages, root, name):
    committed = (root / "docs" / name).read_text(encoding="utf-8")
    assert committed == pages[name], f"docs/{name} is out of date: run python docs/generate.py"


def test_every_letter_of_the_equations_is_in_the_nomenclature(pages):
    """What is left of the formulas once LaTeX commands and the alphabet's letters are taken away is arithmetic."""
    formulas = re.findall(r"\| \$(.*?)\$ \|", pages["equations.md"])
    letters = sorted((s.latex for s in ALPHABET.values()), key=len, reverse=True)
    assert len(formulas) > 150
    for formula in formulas:
        rest = formula
        for letter in letters:
            rest = re.sub(rf"(?<![\\A-Za-z]){re.escape(letter)}(?![A-Za-z_])", "", rest)
        rest = re.sub(r"\\[A-Za-z]+", "", rest)
        assert not re.search(r"[A-Za-z]", rest), (formula, rest)


def test_equations_of_one_projection_by_hand(pages):
    """Down-projection of a gated feed-forward part: 2 B Q h f FLOP over t_p devices."""
    assert r"| `down_proj` | bf16 [FLOP] | $\frac{2 B Q h f}{t_p}$ | 2mnk |" in pages["equations.md"]


def test_no_table_is_broken_by_its_content(pages):
    """Every row of a table has as many cells as its header."""
    for name, text in pages.items():
        width = 0
        for line in text.splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (0, cells), (name, line)
            width = cells


def test_links_between_pages_lead_somewhere(root):
    for page in (root / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (page.name, target)


def examples(root, page):
    """The YAML blocks of a page."""
    return re.findall(r"```yaml\n(.*?)```", (root / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def own_specs(tmp_path, monkeypatch):
    """A user's own folder, searched for the time of one test."""
    monkeypatch.setenv("PERFMODEL_SPECS", str(tmp_path))
    for function in (catalog._index, catalog.nodes):
        function.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for function in (catalog._index, catalog.nodes):
        function.cache_clear()


def test_device_of_the_example_loads_and_gives_the_numbers_of_the_text(root, own_specs):
    device, node = examples(root, "add-a-device.md")
    folder = own_specs / "hardware"
    (folder / "nodes").mkdir(parents=True)
    (folder / "example-x1.yaml").write_text(device)
    (folder / "nodes" / "example-x1-8.yaml").write_text(node)
    e = Estimator("llama-3.1-8b", "x1")
    assert e.machine.devices_per_node == 8
    assert e.machine.link == 200e9
    assert e.machine.peak("bf16") / e.machine.bandwidth == 200
    step = e.parts(1, 1, 128, is_decode=True)
    # 15.01 GB of weights and 129 tokens of cache, 131,072 bytes each, at 2 TB/s.
    assert step.lower == pytest.approx((2 * 7_504_658_432 + 129 * 131_072) / 2e12, rel=1e-4)
    assert step.seconds > step.lower


def test_models_of_the_example_load_and_give_the_numbers_of_the_text(root, own_specs):
    (own_specs / "models").mkdir()
    bf16 = get_format("bf16")
    written = {re.match(r"name: (\S+)", text)[1]: text for text in examples(root, "add-a-model.md")}
    for name, text in written.items():
        (own_specs / "models" / f"{name}.yaml").write_text(text)
    for name in written:
        model = catalog.load_model(name)
        assert parameters_total(model) == 1_100_048_384
        assert memory.kv_bytes_per_token(model, Formats(bf16, bf16, bf16, bf16)) == 22_528
