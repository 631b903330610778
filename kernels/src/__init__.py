"""The operations of DeepSeek Sparse Attention: torch and Triton only, never an engine."""
