"""What a person and a file get: the plan, its report, the frontier, pictures."""
