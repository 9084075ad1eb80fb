"""A function as a flat program: trace it, print it, run it, count what it does."""
