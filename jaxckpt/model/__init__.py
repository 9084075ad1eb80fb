"""A program cut into blocks, and what each way to keep a block takes in bytes and time."""
