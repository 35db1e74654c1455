"""What a container shows of this package: the worker, and what it needs."""
