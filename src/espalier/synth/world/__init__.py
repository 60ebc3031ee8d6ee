"""A fictional domain: names, facts, a book and an examination of which nobody can have read."""
