"""`python -m cluster` is `rstar`."""

from cluster.cli import main

if __name__ == "__main__":
    main()
