"""The real model's sizes, for measurements without its weights."""

from dataclasses import replace

from dsv32_plugin.tools.plan import V32

REAL = replace(V32, num_hidden_layers=2, first_k_dense_replace=1, mtp=False, fp8=False)
"""DeepSeek-V3.2 in bfloat16, with one dense layer instead of three."""
