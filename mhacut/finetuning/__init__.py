"""Fine-tuning of a slim model: reading, training, saving and resuming."""
