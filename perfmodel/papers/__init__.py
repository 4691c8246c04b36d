"""The literature as runnable checks: settings in, predictions and verdicts out."""
