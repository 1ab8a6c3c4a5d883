"""Verify: the proof that a training model is what it should be."""

from fxcollab.verify.report import Check, Report
from fxcollab.verify.verify import verify

__all__ = ["Check", "Report", "verify"]
