"""The real model's sizes, for measurements without its weights."""

from dsv32_plugin.tools import tiny

REAL = tiny.TinySpec(
    hidden_size=7168, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=128, q_lora_rank=1536,
    index_n_heads=64, index_topk=2048, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
    num_experts_per_tok=8, n_group=8, topk_group=4, rope_original=4096, dtype="bfloat16",
)  # fmt: skip
"""DeepSeek-V3.2 in bfloat16, with one dense layer instead of three."""
