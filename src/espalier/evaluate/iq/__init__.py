"""Tasks that nobody can have learned by heart: their letters, words and rules are drawn anew for every item."""
