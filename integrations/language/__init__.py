"""Language models: teach a small transformer something new, and see what it keeps of what it knew."""
