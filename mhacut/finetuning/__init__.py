"""Training a slim model on: what a run is told, how it trains, and how nothing of it is lost."""
