"""``python -m mhacut``."""

from mhacut.cli import main

if __name__ == "__main__":
    main()
