"""Serving under load: workloads, closed forms for percentiles, and an event simulation that checks them."""
