"""Golden runs: what pruning computed before the package was rebuilt."""
