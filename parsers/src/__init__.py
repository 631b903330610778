"""Chat encoding and output parsing for DeepSeek-V3.2: standard library only."""
