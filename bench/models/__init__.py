"""Whole models: `python -m tp_overlap_kernels.bench one-batch | serving`.

Models of transformers with published sizes and random weights, divided over the ranks by transformers' own plan. Four
arms run the same model, and differ in what happens after the matmul of its row-parallel layers; see arms.py and
docs/models.md.
"""
