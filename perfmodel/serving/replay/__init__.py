"""Iteration-level event simulation of serving instances and fleets, with the estimator's tables as clock."""

from perfmodel.serving.replay.fleet import Fleet, Pool, simulate
from perfmodel.serving.replay.handoff import Handoff
from perfmodel.serving.replay.outcome import Gaps, Outcome, Usage, merge
from perfmodel.serving.replay.prefix import Tier
from perfmodel.serving.replay.routing import Affinity
from perfmodel.serving.replay.settings import Settings

__all__ = ["Affinity", "Fleet", "Gaps", "Handoff", "Outcome", "Pool", "Settings", "Tier", "Usage", "merge", "simulate"]
