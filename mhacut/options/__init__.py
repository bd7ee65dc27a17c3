"""The options of every command, each stated once."""
