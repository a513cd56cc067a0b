"""Routing algorithms for mixture-of-experts language models, compared honestly.

Importing this package loads nothing else; ask for the part you need: ``from lightning_base.routing import Switch``.
"""

__version__ = "0.1.0"
