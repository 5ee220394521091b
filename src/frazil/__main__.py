"""`python -m frazil` is `frazil`."""
from frazil.cli import entry

if __name__ == "__main__":
    entry()
