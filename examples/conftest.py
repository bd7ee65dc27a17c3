"""Fixtures of the test suite that tests of the examples use."""

from helpers.fixtures import brief_times, few_digits, programs, short_stacks  # noqa: F401
