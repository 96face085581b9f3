"""Finding the strategy that fits a user's own documents."""
