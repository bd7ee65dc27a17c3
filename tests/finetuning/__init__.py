"""Fine-tuning: what it learns from, what it refuses, and that nothing of a run is lost."""
