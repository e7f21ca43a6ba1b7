"""Adapters for frameworks, one a file. Nothing imports them: each is asked for by name, and imports its framework then.

from tp_overlap_kernels.integrations import transformers
transformers.enable(max_tokens=8192)                        # before from_pretrained(distributed_config=...)

Serving engines find theirs through entry points of this package, and they do nothing unless TP_OVERLAP is set.
"""
