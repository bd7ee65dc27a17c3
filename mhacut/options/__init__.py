"""Options of every command, each stated once."""
