"""What a chip is, how fast, how its compiler behaves, and where it is installed."""
