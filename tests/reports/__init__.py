"""Reports, inspection and comparison."""
