"""Finding specs: the user's folder first, aliases, unknown names, broken files and caches that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError, UnknownName
from perfmodel.spec.hardware import Device, Network

DEVICE = """\
name: {name}
title: {title}
vendor: Nobody
aliases: [{aliases}]
kind: accelerator
architecture: hopper
compute: {{source: unverified, vector: {{fp32: 67 TFLOP/s}}, units: 132, unit_name: SM, clock: 1.98 GHz}}
memory: {{source: unverified, technology: hbm3, capacity: 80 GB, bandwidth: 3.35 TB/s}}
"""

Add = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with the built-in catalogue alone, an empty cache, and leaves nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "_user_roots", [])
    caches = (catalog._index, catalog.nodes)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Write a device file into a user's folder, by default `specs/hardware/`."""

    def write(name: str, aliases: str = "", *, title: str = "Mine", folder: str = "specs/hardware", text: str = "") -> Path:
        path = tmp_path / folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or DEVICE.format(name=name, aliases=aliases, title=title))
        return path

    return write


# --- the built-in catalogue -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["h100-sxm", "H100-SXM", "H100 SXM", "h100_sxm", " h100-sxm "])
def test_spelling_does_not_matter(spelling: str) -> None:
    assert catalog.load_hardware(spelling).name == "h100-sxm"


def test_an_alias_and_a_hub_id_find_the_file() -> None:
    assert catalog.find("models", "meta-llama/Llama-3.1-8B") == catalog.find("models", "llama-3.1-8b")


def test_each_kind_of_hardware_has_its_type() -> None:
    assert isinstance(catalog.load_hardware("h100-sxm"), Device)
    assert isinstance(catalog.load_hardware("nvlink4"), Network)


@pytest.mark.parametrize("kind", ["hardware", "models"])
def test_every_name_is_found_as_itself(kind: str) -> None:
    names = catalog.names(kind)
    assert names
    assert [catalog.find(kind, name).stem for name in names] == names


def test_prices_and_calibrations_are_not_devices() -> None:
    files = [p.stem for folder in ("prices", "calibrations") for p in (catalog.root("hardware") / folder).glob("*.yaml")]
    assert "law" in files
    assert not set(files) - set(calibration.calibrated_devices()) & set(catalog.names("hardware"))
    # A calibration is named after its device, and the device's name still finds the datasheet.
    assert calibration.calibrated_devices()
    for name in calibration.calibrated_devices():
        assert "calibrations" not in catalog.find("hardware", name).parts


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown device or node 'h100-smx' \(did you mean 'h100-sxm'\?\)") as caught:
        catalog.load_hardware("h100-smx")
    assert "`perfmodel hardware list` shows all" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(UnknownName, match="unknown model 'llama-3.1-8bb'.*did you mean"):
        catalog.load_model("llama-3.1-8bb")


def test_the_wrong_kind_of_hardware_is_named() -> None:
    with pytest.raises(SpecError, match="'nvlink4' is of kind 'network', and a device is wanted here"):
        catalog.load_device("nvlink4")
    with pytest.raises(SpecError, match="'h100-sxm' is of kind 'accelerator', and a node is wanted here"):
        catalog.load_node("h100-sxm")


# --- the user's own -------------------------------------------------------------------------------------------------


def test_the_users_folder_comes_first(add: Add, tmp_path: Path) -> None:
    builtin = catalog.load_device("h100-sxm")
    add("h100-sxm", title="Mine")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("h100-sxm").title == "Mine" != builtin.title
    assert catalog.load_device("a100-sxm-80gb").vendor == "nvidia"


def test_the_users_alias_beats_a_built_in_name(add: Add, tmp_path: Path) -> None:
    add("my-h100", "h100-sxm")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("h100-sxm").name == "my-h100"


def test_within_a_folder_a_name_beats_an_alias(add: Add, tmp_path: Path) -> None:
    add("aaa", "bbb")
    add("bbb")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("bbb").name == "bbb"


def test_the_environment_names_folders_and_the_option_wins(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("toy", title="From the environment", folder="env/hardware")
    add("other", folder="env2/hardware")
    monkeypatch.setenv("PERFMODEL_SPECS", os.pathsep.join([str(tmp_path / "env"), str(tmp_path / "env2")]))
    assert catalog.load_device("toy").title == "From the environment"
    assert catalog.load_device("other").title == "Mine"
    add("toy", title="From the option")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("toy").title == "From the option"


def test_a_flat_folder_holds_one_kind(add: Add, tmp_path: Path) -> None:
    add("toy", folder="flat")
    catalog.use_specs(tmp_path / "flat")
    assert catalog.load_device("toy").name == "toy"


def test_models_in_the_users_folder_are_not_hardware(add: Add, tmp_path: Path) -> None:
    add("my-model", folder="specs/models")
    catalog.use_specs(tmp_path / "specs")
    assert "my-model" in catalog.names("models")
    assert "my-model" not in catalog.names("hardware")


def test_folders_that_do_not_exist_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="no such folder of specs"):
        catalog.use_specs(tmp_path / "absent")
    monkeypatch.setenv("PERFMODEL_SPECS", str(tmp_path / "absent"))
    with pytest.raises(SpecError, match=r"no such folder of specs: .*absent \(from \$PERFMODEL_SPECS\)"):
        catalog.load_device("h100-sxm")


def test_a_path_is_taken_as_it_is(add: Add, tmp_path: Path) -> None:
    path = add("toy", folder="anywhere")
    assert catalog.load_device(str(path)).name == "toy"
    with pytest.raises(SpecError, match="absent.yaml: no such file"):
        catalog.load_device(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "broken.yaml:2: duplicate key 'a'"),
        (": : :\n", "broken.yaml:1: not valid YAML"),
        ("- 1\n", "broken.yaml:1: expected a mapping"),
        ("", "broken.yaml: the file is empty"),
        ("name: broken\naliases: text\n", "broken.yaml:1: missing key 'title'"),
    ],
)
def test_a_broken_file_harms_only_itself(add: Add, tmp_path: Path, text: str, says: str) -> None:
    path = add("broken", text=text or " ")
    add("sound")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("sound").name == "sound"
    assert catalog.load_device("h100-sxm").name == "h100-sxm"
    with pytest.raises(SpecError) as caught:
        catalog.load_device("broken")
    assert says in str(caught.value)
    assert caught.value.file == str(path)


def test_an_alias_that_is_not_a_list_is_not_spelt_out(add: Add, tmp_path: Path) -> None:
    add("broken", text="name: broken\naliases: xyz\n")
    catalog.use_specs(tmp_path / "specs")
    with pytest.raises(UnknownName):
        catalog.find("hardware", "x")


# --- the cache of the index -----------------------------------------------------------------------------------------


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "perfmodel").glob("index-*.json"))


def test_the_index_is_kept_and_refreshed_when_a_file_changes(add: Add, tmp_path: Path) -> None:
    path = add("toy", "first-alias")
    catalog.use_specs(tmp_path / "specs")
    assert catalog.load_device("first-alias").name == "toy"
    [kept] = cache_files(tmp_path)
    assert "first-alias" in kept.read_text()

    path.write_text(DEVICE.format(name="toy", aliases="second-alias", title="Mine"))
    os.utime(path, ns=(1, 1))
    catalog._index.cache_clear()
    assert catalog.find("hardware", "second-alias") == path
    with pytest.raises(UnknownName):
        catalog.find("hardware", "first-alias")


def test_unchanged_files_are_not_read_again(add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add("toy", "alias")
    catalog.use_specs(tmp_path / "specs")
    catalog.find("hardware", "alias")
    catalog._index.cache_clear()
    monkeypatch.setattr(catalog, "_names_in", lambda path: pytest.fail(f"read {path} again"))
    assert catalog.find("hardware", "alias").stem == "toy"


@pytest.mark.parametrize("rubbish", ["", "{", "[]", "null", "\x00"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, rubbish: str) -> None:
    catalog.find("hardware", "h100-sxm")
    [kept] = cache_files(tmp_path)
    sound = kept.read_text()
    kept.write_text(rubbish)
    catalog._index.cache_clear()
    assert catalog.find("hardware", "h100-sxm").stem == "h100-sxm"
    assert json.loads(kept.read_text()) == json.loads(sound)


def test_a_cache_that_cannot_be_written_costs_only_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file where the folder should be refuses root too, which a mode does not.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert catalog.find("hardware", "h100-sxm").stem == "h100-sxm"


def test_an_account_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(catalog.tempfile, "gettempdir", lambda: str(tmp_path))
    assert catalog.find("hardware", "h100-sxm").stem == "h100-sxm"
    assert list((tmp_path / "perfmodel").glob("index-hardware-*.json"))


def test_two_processes_may_build_the_index_at_once(tmp_path: Path) -> None:
    program = "from perfmodel import calibration, catalog; print(catalog.find('hardware', 'h100-sxm').stem)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in running] == ["h100-sxm"] * 3
    [kept] = cache_files(tmp_path)
    assert isinstance(json.loads(kept.read_text()), dict)
    assert list(kept.parent.iterdir()) == [kept]
