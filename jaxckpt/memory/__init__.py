"""What a compiler materialises, when it lives, and the most bytes alive at once."""
