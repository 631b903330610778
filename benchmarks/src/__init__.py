"""The benchmark harness: correct first, then fast, peers in the same run."""
