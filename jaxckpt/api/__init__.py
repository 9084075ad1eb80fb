"""One file for each public verb."""
