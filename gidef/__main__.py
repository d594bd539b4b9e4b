"""`python -m gidef`, and `torchrun -m gidef attack RUN` on several ranks."""

from gidef.cli import main

if __name__ == "__main__":
    main()
