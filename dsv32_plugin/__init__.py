"""DeepSeek-V3.2 (DeepSeek Sparse Attention) for stock vLLM and SGLang.

Importing this package has no side effects and imports neither torch nor an engine. The engines find it through
their entry points; people use the command `dsv32`.
"""

__version__ = "0.2.0"
