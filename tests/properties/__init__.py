"""What is always true of a cut, for any plan, on every attention and MLP class that is cut."""
