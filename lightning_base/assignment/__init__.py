"""Balanced assignment: scores in, experts out. Pure functions; needs neither Lightning nor Hydra.

>>> import torch
>>> from lightning_base.assignment import balanced_assignment
>>> balanced_assignment(torch.tensor([[3.0, 1.0], [2.0, 1.0]])).expert.tolist()
[0, 1]
"""

from lightning_base.assignment.solve import SOLVERS, Assignment, balanced_assignment, balanced_assignments

__all__ = ["SOLVERS", "Assignment", "balanced_assignment", "balanced_assignments"]
