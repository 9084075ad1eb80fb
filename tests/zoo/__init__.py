"""Models the tests plan: small ones of every shape, and GPT-2."""
