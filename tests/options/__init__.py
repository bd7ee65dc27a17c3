"""Options: their types, texts and keywords."""
