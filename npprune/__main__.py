"""`python -m npprune`, also what torchrun starts."""

from npprune.cli.app import main

if __name__ == "__main__":
    main()
