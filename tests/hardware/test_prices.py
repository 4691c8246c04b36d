"""Price lists: whole, dated, and of the size that the market has."""

from datetime import date

import pytest

from perfmodel import catalog
from perfmodel.spec.hardware import Node

LISTS = catalog.load_prices()
ITEMS = [(prices, item) for prices in LISTS for item in prices.items]
HOUR = 3600.0


def _devices(item):
    """Accelerators in a purchase unit: 8 for a node sold whole, 1 where eight units make one."""
    spec = catalog.load_hardware(item.node)
    return (spec.devices.count if isinstance(spec, Node) else 1) / item.units_per_node


def _find(provider, instance, term="on-demand"):
    found = [i for p, i in ITEMS if p.provider == provider and i.instance == instance and i.term == term]
    assert found, f"{provider} {instance} {term}"
    return found[0]


@pytest.mark.parametrize("prices", LISTS, ids=lambda p: f"{p.provider}-{p.region}-{p.date}")
def test_dates_are_iso_and_past(prices):
    assert date(2024, 1, 1) < date.fromisoformat(prices.date) <= date.today()
    assert len(prices.date) == len("2025-01-31")


def test_every_priced_node_is_in_the_catalogue():
    assert len(ITEMS) > 50
    for _, item in ITEMS:
        assert catalog.load_hardware(item.node).name == item.node
        assert _devices(item) == int(_devices(item)), f"{item.instance}: units_per_node"


def test_on_demand_prices_per_accelerator_hour_are_sane():
    for prices, item in ITEMS:
        if item.term == "on-demand":
            usd = item.price * HOUR / _devices(item)
            assert 0.1 < usd < 20, f"{prices.provider} {item.instance}: {usd:.2f} USD per accelerator-hour"


def test_spot_is_cheaper_than_on_demand():
    compared = 0
    for prices in LISTS:
        full = {i.instance: i.price for i in prices.items if i.term == "on-demand"}
        for item in prices.items:
            if item.term == "spot" and item.instance in full:
                assert 0.05 * full[item.instance] < item.price < full[item.instance], item.instance
                compared += 1
    assert compared > 10


def test_no_list_prices_the_same_thing_twice():
    for prices in LISTS:
        keys = [(i.instance, i.node, i.term) for i in prices.items]
        assert len(keys) == len(set(keys)), prices.provider


def test_a_newer_generation_costs_more():
    for provider in ("aws", "lambda"):
        of = {i.node: i.price for p, i in ITEMS if p.provider == provider and i.term == "on-demand"}
        assert of["hgx-a100-40gb-8"] < of["hgx-a100-8"] < of["hgx-h100-8"] < of["hgx-b200-8"]


def test_bought_nodes_have_a_life_and_a_running_cost():
    bought = [(p, i) for p, i in ITEMS if i.term == "purchase"]
    assert {i.node for _, i in bought} >= {"hgx-h100-8", "l40s-server-8", "rtx-4090-workstation-8", "gb200-nvl72"}
    for prices, item in bought:
        assert prices.amortisation == 4 * 365.25 * 24 * HOUR
        assert prices.host_and_power > 0
        # a card alone costs at least 1,000 USD and a datacentre GPU with its share of the node at most 60,000
        assert 1_000 < item.capital / _devices(item) < 60_000, item.instance


def test_running_cost_covers_the_electricity():
    """0.05 USD/kWh without any cooling is a lower bound."""
    for prices, item in ITEMS:
        if item.term == "purchase":
            node = catalog.load_node(item.node)
            assert prices.host_and_power * HOUR > node.power.maximum / 1000 * 0.05, item.instance


def test_starter_nodes_have_an_on_demand_price():
    priced = {i.node for _, i in ITEMS if i.term == "on-demand"}
    assert priced >= {"hgx-h100-8", "hgx-a100-8", "l40s-server-8", "rtx-4090-workstation-8"}


@pytest.mark.parametrize(
    ("provider", "instance", "per_accelerator"),
    [
        ("aws", "p5.48xlarge", 6.88),
        ("aws", "p5en.48xlarge", 7.912),
        ("aws", "g5.48xlarge", 2.036),
        ("azure", "Standard_ND96isr_H100_v5", 12.29),
        ("gcp", "tpu-v5litepod-8", 1.20),
        ("gcp", "tpu-v6e-8", 2.70),
        ("lambda", "8x H100 SXM", 2.99),
        ("lambda", "8x A100 SXM 80GB", 1.79),
        ("nebius", "8x H100 SXM", 2.95),
        ("nebius", "8x H200 SXM", 3.50),
        ("runpod", "RTX 4090 GPU-hour", 0.74),
        ("runpod", "L40S GPU-hour", 0.99),
    ],
)
def test_known_prices_per_accelerator_hour(provider, instance, per_accelerator):
    """Whole-instance prices of the lists against the per-accelerator prices the providers advertise."""
    item = _find(provider, instance)
    assert item.price * HOUR / _devices(item) == pytest.approx(per_accelerator, rel=1e-3)


def test_gcp_machines_are_host_and_accelerators():
    assert _find("gcp", "a2-highgpu-8g").price * HOUR == pytest.approx(5.91582 + 8 * 2.93391, rel=1e-4)
    assert _find("gcp", "a3-highgpu-8g").price * HOUR == pytest.approx(9.46006 + 78.37241, rel=1e-4)
    assert _find("gcp", "a2-ultragpu-8g").price * HOUR == pytest.approx(8.79698 + 35.39358, rel=1e-4)


def test_owned_h100_by_hand():
    """310,000 USD / (4 x 8766 h) + 2.5 USD/h = 11.34 USD/h."""
    prices, item = next((p, i) for p, i in ITEMS if i.term == "purchase" and i.node == "hgx-h100-8")
    hourly = (item.capital / prices.amortisation + prices.host_and_power) * HOUR
    assert hourly == pytest.approx(11.34, abs=0.01)
