"""Check a serving command against its engine's options, the model, the hardware and the workload."""

from perfmodel.lint.finding import Finding, Report
from perfmodel.lint.run import lint

__all__ = ["Finding", "Report", "lint"]
