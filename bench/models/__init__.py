"""Whole models: `python -m tp_overlap_kernels.bench one-batch | serving`.

Models of transformers with published sizes and random weights, divided over the ranks by transformers' own plan. Three
arms run the same model, and differ in what the row-parallel layers do after their matmul; see arms.py and
docs/models.md.
"""
