"""The index query: rope, rotation, fp8, and the head weights with every scale folded in."""
