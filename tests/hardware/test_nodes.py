"""Nodes, networks and drives against the devices they hold and against hand arithmetic."""

from pathlib import Path

import pytest

from perfmodel import catalog
from perfmodel.kernels.transfer import host_copy_seconds
from perfmodel.machine import from_device, from_node, machine
from perfmodel.spec import yaml
from perfmodel.spec.hardware import Device, Network, Node

ROOT = catalog.root("hardware")
GB = 1e9


def _files(folder):
    return sorted((ROOT / folder).glob("*.yaml"))


def _specs(folder):
    return [catalog.load_hardware(str(path)) for path in _files(folder)]


NODES = _specs("nodes")
NETWORKS = _specs("network")
DRIVES = _specs("storage")


def _ids(specs):
    return [spec.name for spec in specs]


each_node = pytest.mark.parametrize("node", NODES, ids=_ids(NODES))


@pytest.mark.parametrize(("folder", "kind"), [("nodes", Node), ("network", Network), ("storage", Device)])
def test_every_file_is_of_its_folder_and_named_by_its_stem(folder, kind):
    paths = _files(folder)
    assert len(paths) >= 5
    for path in paths:
        spec = catalog.load_hardware(str(path))
        assert isinstance(spec, kind), path
        assert spec.name == path.stem


def test_drives_and_expanders_are_not_compute_devices():
    kinds = {spec.name: spec.kind for spec in DRIVES}
    assert set(kinds.values()) == {"storage", "memory_expander"}
    assert kinds["cxl-expander"] == "memory_expander"


def test_names_and_aliases_are_unique_over_the_whole_catalogue():
    owner: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.yaml")):
        if path.relative_to(ROOT).parts[0] in ("prices", "calibrations"):
            continue
        data = yaml.read(path).data
        for name in {path.stem, *map(str, data.get("aliases") or [])}:
            key = catalog._key(name)
            assert owner.setdefault(key, path.stem) == path.stem, f"{name!r}: {owner[key]} and {path.stem}"


def test_every_link_of_every_device_is_a_network():
    known = set(_ids(NETWORKS))
    links = 0
    for path in sorted(ROOT.rglob("*.yaml")):
        if path.relative_to(ROOT).parts[0] in ("prices", "calibrations", "nodes", "network"):
            continue
        for role, link in catalog.load_device(str(path)).links.items():
            assert link.technology in known, f"{path.stem}, {role}: {link.technology}"
            links += 1
    assert links > 50


@each_node
def test_everything_a_node_names_is_in_the_catalogue(node):
    device = catalog.load_device(node.devices.device)
    assert device.name == node.devices.device
    assert device.kind == "accelerator"
    networks = set(_ids(NETWORKS))
    assert node.fabric.technology in networks
    if node.pcie:
        assert node.pcie.technology in networks
    if node.network:
        assert node.network.technology in networks
    if node.host:
        assert catalog.load_device(node.host.cpu).kind == "cpu"
    for drive in node.drives:
        assert catalog.load_device(drive.device).kind == "storage"


@each_node
def test_fabric_agrees_with_the_link_of_the_device(node):
    device = catalog.load_device(node.devices.device)
    if node.name == "edge-orin":  # one device whose only port is Ethernet
        assert (node.fabric.topology, node.fabric.technology) == ("none", "ethernet-10g")
        return
    if node.fabric.topology in ("switch", "mesh", "torus", "ring", "pairs"):
        link = device.links["scale_up"]
    else:
        link = device.links.get("scale_up") if node.fabric.technology.startswith("nvlink") else device.links["host"]
    if node.name == "h100-pcie-8":
        assert node.fabric.bandwidth == pytest.approx(link.bandwidth / 2)  # a Gen4 host under Gen5 cards
    else:
        assert node.fabric.technology == link.technology
        assert node.fabric.bandwidth == pytest.approx(link.bandwidth, rel=1e-3)


@each_node
def test_a_host_link_is_not_faster_than_the_card_or_the_technology(node):
    if node.pcie is None:
        assert node.name == "edge-orin"
        return
    technology = catalog.load_hardware(node.pcie.technology)
    device = catalog.load_device(node.devices.device)
    assert node.pcie.bandwidth <= technology.bandwidth * 1.001
    assert node.pcie.bandwidth <= device.links["host"].bandwidth * 1.001
    assert node.devices.count % node.pcie.devices_per_switch == 0
    assert node.devices.count % node.pcie.devices_per_root_complex == 0
    assert node.pcie.devices_per_switch <= node.pcie.devices_per_root_complex


LANES = {"pcie3-x16": (16, 8e9), "pcie4-x16": (16, 16e9), "pcie5-x16": (16, 32e9)}


@pytest.mark.parametrize(
    ("name", "card", "slot"),
    [
        ("rtx-a6000-edge-1", "pcie4-x16", "pcie3-x16"),
        ("h100-pcie-8", "pcie5-x16", "pcie4-x16"),
        ("rtx-3090-workstation-1", "pcie4-x16", "pcie4-x16"),
        ("hgx-h100-8", "pcie5-x16", "pcie5-x16"),
    ],
)
def test_the_host_link_is_at_most_the_nodes_slot(name, card, slot):
    """Lanes x transfers/s x 128/130 / 8 bytes/s of the slower of card and slot; alone, the card's own."""

    def by_hand(technology):
        lanes, transfers = LANES[technology]
        return lanes * transfers * 128 / 130 / 8

    node = catalog.load_node(name)
    device = catalog.load_device(node.devices.device)
    assert (device.links["host"].technology, node.pcie.technology) == (card, slot)
    assert machine(name).host_link == pytest.approx(min(by_hand(card), by_hand(slot)), rel=1e-3)
    assert from_device(device, None).host_link == pytest.approx(by_hand(card), rel=1e-3)


def test_a_slot_faster_than_the_card_gives_nothing_and_no_port_is_no_link():
    node = catalog.load_node("rtx-a6000-edge-1")
    faster = node.model_copy(update={"pcie": node.pcie.model_copy(update={"bandwidth": 63 * GB})})
    without = node.model_copy(update={"pcie": None})
    assert from_node(faster).host_link == from_node(without).host_link == pytest.approx(31.5 * GB, rel=1e-3)
    assert machine("edge-orin").host_link == 0


def test_a_copy_takes_twice_as_long_through_a_slot_of_half_the_rate():
    """1 GB is 63.5 ms at 15.75 GB/s and 31.7 ms at 31.5, before what the link achieves."""
    size, m = 1e9, machine("rtx-a6000-edge-1")
    through, alone = (host_copy_seconds(x, size) - host_copy_seconds(x, 0) for x in (m, from_device(m.device, None)))
    assert through == pytest.approx(2 * alone, rel=1e-3)
    assert through > size / (15.76 * GB)


@each_node
def test_a_nic_has_the_rate_of_its_technology(node):
    if node.network:
        assert node.network.bandwidth == pytest.approx(catalog.load_hardware(node.network.technology).bandwidth)


@each_node
def test_host_memory_bandwidth_is_that_of_its_sockets(node):
    """Unless the notes call the CPU a stand-in, whose own memory then counts."""
    if node.host is None:
        assert node.name == "edge-orin"
        return
    cpu = catalog.load_device(node.host.cpu)
    total = node.host.sockets * cpu.memory.bandwidth
    if any("stand-in" in note for note in node.notes):
        assert 0.2 * total < node.host.memory_bandwidth < 2 * total
    else:
        assert node.host.memory_bandwidth == pytest.approx(total, rel=1e-3)


@each_node
def test_power_is_the_devices_and_the_overhead(node):
    tdp = catalog.load_device(node.devices.device).power
    if tdp is None:
        assert node.power is None, "no TDP to split the node's power by"
    elif node.power:
        assert node.power.maximum == pytest.approx(node.devices.count * tdp.tdp + node.power.overhead, rel=0.01)
        assert 0 < node.power.overhead < node.power.maximum


@each_node
def test_unpublished_or_derived_power_is_said_in_the_notes(node):
    if node.power and node.power.source == "unverified" and node.name not in ("hgx-h20-8", "hgx-h800-8"):
        assert any("published" in note or "derived" in note for note in node.notes)


@pytest.mark.parametrize(
    ("name", "count", "per_direction", "reduces"),
    [
        # links per GPU x GB/s per direction; NVLink SHARP came with the third NVSwitch (Hopper)
        ("hgx-a100-8", 8, 12 * 25, False),
        ("hgx-a100-40gb-8", 8, 12 * 25, False),
        ("hgx-h100-8", 8, 18 * 25, True),
        ("hgx-h200-8", 8, 18 * 25, True),
        ("hgx-h800-8", 8, 8 * 25, True),
        ("hgx-b200-8", 8, 18 * 50, True),
        ("hgx-b300-8", 8, 18 * 50, True),
        ("gb200-nvl72", 72, 18 * 50, True),
        ("gb300-nvl72", 72, 18 * 50, True),
        ("dgx-1-v100-8", 8, 6 * 25, False),
        ("mi300x-8", 8, 7 * 64, False),
        ("mi355x-8", 8, 7 * 76.8, False),
        ("gaudi2-8", 8, 21 * 100 / 8, False),
        ("gaudi3-8", 8, 21 * 200 / 8, False),
        ("tpu-v5e-8", 8, 4 * 50, False),
        ("tpu-v6e-8", 8, 4 * 100, False),
        ("atlas-800i-a2", 8, 7 * 28, False),
        ("cloudmatrix384", 384, 2 * 196, False),
        ("l40s-server-8", 8, 16 * 16 * 128 / 130 / 8, False),
        ("rtx-4090-workstation-8", 8, 16 * 16 * 128 / 130 / 8, False),
    ],
)
def test_fabric_by_hand(name, count, per_direction, reduces):
    node = catalog.load_node(name)
    assert node.devices.count == count
    assert node.fabric.bandwidth == pytest.approx(per_direction * GB, rel=1e-3)
    assert node.fabric.in_switch_reduction is reduces


def test_nvl72_adds_up_to_the_published_130_tb_per_s():
    for name in ("gb200-nvl72", "gb300-nvl72"):
        node = catalog.load_node(name)
        assert 2 * 72 * node.fabric.bandwidth == pytest.approx(130e12, rel=0.01)  # both directions


def test_dgx_h100_reaches_the_504_gb_per_s_stated_between_gpus_and_host():
    node = catalog.load_node("dgx-h100")
    assert node.pcie.devices_per_switch == 1
    assert 8 * node.pcie.bandwidth == pytest.approx(504 * GB)


def test_consumer_cards_have_no_peer_to_peer():
    for name in ("rtx-4090-workstation-2", "rtx-4090-workstation-4", "rtx-4090-workstation-8"):
        node = catalog.load_node(name)
        assert not node.fabric.p2p
        assert node.fabric.topology == "pcie"
    assert catalog.load_node("l40s-server-8").fabric.p2p


def test_pairs_have_bridges_between_two():
    for name in ("h100-nvl-8", "a100-pcie-8"):
        node = catalog.load_node(name)
        assert node.fabric.topology == "pairs"
        assert node.devices.count % 2 == 0


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dgx-h100", "hgx-h100-8"),
        ("DGX A100", "hgx-a100-8"),
        ("T4-16GB + 208GB DRAM + 1.5TB SSD", "t4-server"),
        ("t4-16gb+208gb dram+1.5tb ssd", "t4-server"),
        ("NVL72", "gb200-nvl72"),
        ("g5.48xlarge", "a10g-server-8"),
    ],
)
def test_nodes_by_alias(alias, name):
    assert catalog.load_node(alias).name == name


def test_flexgen_host():
    node = catalog.load_node("t4-server")
    assert (node.devices.device, node.devices.count) == ("t4", 1)
    assert node.host.memory == 208e9
    assert sum(d.count * catalog.load_device(d.device).storage.capacity for d in node.drives) == 1.5e12


@pytest.mark.parametrize(("generation", "giga_transfers"), [(3, 8), (4, 16), (5, 32)])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_pcie_by_hand(generation, giga_transfers, lanes):
    """GT/s x lanes x 128/130 (line code) / 8 bits: Gen4 x16 = 16 x 16 x 0.98462 / 8 = 31.508 GB/s."""
    link = catalog.load_hardware(f"pcie{generation}-x{lanes}")
    assert link.bandwidth == pytest.approx(giga_transfers * lanes * 128 / 130 / 8 * GB, rel=2e-4)
    assert link.role == "host"


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("edr", 100 / 8), ("hdr", 200 / 8), ("ndr", 400 / 8), ("xdr", 800 / 8),
        ("25gbe", 25 / 8), ("100gbe", 12.5), ("200gbe", 25), ("400gbe", 50),
        ("roce-100gbe", 12.5), ("roce-200gbe", 25), ("roce-400gbe", 50),
        ("nvlink1", 4 * 20), ("nvlink2", 6 * 25), ("nvlink3", 12 * 25), ("nvlink4", 18 * 25), ("nvlink5", 18 * 50),
        ("nvlink-c2c", 900 / 2), ("cxl2-x8", 31.508), ("cxl2-x16", 63.015),
        ("ici-v4", 6 * 50), ("ici-v5e", 400 / 2), ("ici-v5p", 1200 / 2), ("ici-v6e", 800 / 2),
        ("hccs", 7 * 28), ("unified-bus", 784 / 2), ("xe-link", 4 * 53 / 8),
        ("gddr6-interface", 32 * 16 / 8), ("hbm2-interface", 1024 * 2.4 / 8),
        ("infinity-fabric-3", 16 * 25 / 8), ("infinity-fabric-4", 7 * 16 * 32 / 8),
    ],
)  # fmt: skip
def test_network_by_hand(name, gigabytes):
    assert catalog.load_hardware(name).bandwidth == pytest.approx(gigabytes * GB, rel=1e-3)


def test_cluster_networks_say_whether_they_bypass_the_host():
    for network in NETWORKS:
        if network.role == "scale_out":
            assert network.rdma == (not network.name.startswith("ethernet")), network.name


@pytest.mark.parametrize("drive", DRIVES, ids=_ids(DRIVES))
def test_a_drive_is_not_faster_than_its_link(drive):
    link = drive.links.get("host")
    if link is None:
        assert drive.name in ("sata-ssd", "ssd-flexgen-t4")
        return
    assert link.bandwidth == pytest.approx(catalog.load_hardware(link.technology).bandwidth)
    if drive.storage:
        assert max(drive.storage.read, drive.storage.write) < link.bandwidth
    else:  # DRAM behind CXL: the sheet counts reads and writes together
        assert link.bandwidth < drive.memory.bandwidth < 2 * link.bandwidth


def test_computational_drives_by_hand():
    csd = catalog.load_device("instcsd").storage
    assert csd.internal_read == pytest.approx(8 * 1.4 * GB)  # flash channels
    assert csd.internal_read / csd.read == pytest.approx(1.6)
    smart = catalog.load_device("smartssd").storage
    assert smart.internal_read < 4 * 8 * 128 / 130 / 8 * GB  # the FPGA's own PCIe Gen3 x4


def test_cited_documents_have_a_title_and_a_place():
    for spec in (*NODES, *NETWORKS, *DRIVES):
        for key, source in spec.sources.items():
            assert source.url, f"{spec.name}: {key}"
            assert source.date, f"{spec.name}: {key}"
            assert key in spec.source_keys().values(), f"{spec.name}: {key} is listed and not cited"


def test_no_path_of_a_number_source_is_misspelt():
    for spec in (*NODES, *NETWORKS, *DRIVES):
        for path in spec.number_sources:
            part = spec
            for step in path.split("."):
                part = part[step] if isinstance(part, dict) else getattr(part, step)
            assert part is not None, f"{spec.name}: {path}"


def test_the_folders_hold_nothing_else():
    for folder in ("nodes", "network", "storage", "prices"):
        assert {p.suffix for p in Path(ROOT / folder).iterdir()} == {".yaml"}
