"""What ails a function that has checkpoints of its own: found by cause, and confirmed by compiling it without."""
