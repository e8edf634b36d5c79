"""How fast and how well one network trains."""
