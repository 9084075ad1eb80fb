"""XLA's own description of a compiled program: its module, schedule and buffer assignment."""
