"""What every router promises, asked of any router: ``lightning-base check-router``, or ``checks`` in pytest."""

from lightning_base.check_router.asked import ALL, Asked, checks
from lightning_base.check_router.check import Broken, Check, NotAsked, Outcome
from lightning_base.check_router.subject import Subject

__all__ = ["ALL", "Asked", "Broken", "Check", "NotAsked", "Outcome", "Subject", "checks"]
