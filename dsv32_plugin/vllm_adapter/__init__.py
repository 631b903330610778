"""The vLLM adapter: everything that knows vLLM lives in this folder."""
