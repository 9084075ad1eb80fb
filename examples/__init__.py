"""Real models on real data, each runnable as it is."""
