"""`python -m mainspring`, which torchrun starts: `torchrun --nproc-per-node 4 -m mainspring train ...`."""

from mainspring.cli.main import main

if __name__ == "__main__":
    main()
