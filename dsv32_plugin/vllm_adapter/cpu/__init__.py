"""The test bed without a GPU: what vLLM lacks there. Nothing that serves on a GPU needs it."""
