"""The test bed without a GPU: what SGLang lacks there. Nothing that serves on a GPU needs it."""
