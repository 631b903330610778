"""The operations, and where each is."""

FOLDERS = {
    "norm_rope_cache": "norm_rope_cache",
    "index_query": "index_query",
    "index_logits_paged": "index_logits",
    "index_logits_ragged": "index_logits",
    "gather_index_keys": "gather_cache",
    "gather_latents": "gather_cache",
    "rope_query": "rope_query",
    "select_topk": "select_topk",
    "select_mask": "select_topk",
    "index_topk_paged": "index_topk",
    "index_topk_ragged": "index_topk",
    "index_mask_ragged": "index_topk",
    "sparse_mla": "sparse_mla",
    "dense_mla": "dense_mla",
    "masked_mha": "masked_mha",
}
"""Operation -> the folder under ops/ that holds it."""
