"""From a budget to a schedule that the compiler confirms."""
