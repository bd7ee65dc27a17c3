"""The command line: what it prints where, what it refuses, how it exits."""
