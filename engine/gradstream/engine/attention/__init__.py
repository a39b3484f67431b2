"""Causal attention over packed rows and caches, behind one seam in transformers."""
