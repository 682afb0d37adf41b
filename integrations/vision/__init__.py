"""Images, networks for them, and their evaluation: what the vision tasks share."""
