"""Commands as functions, from file to file."""
