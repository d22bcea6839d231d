"""The nouns of the recipe: standard library and numpy only."""
