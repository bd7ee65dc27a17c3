"""The method, a module per stage."""
