"""Causal language models of ``transformers`` whose feed-forward layers become sparse."""
