"""Model files: find them, fetch them, prove them, load them."""
