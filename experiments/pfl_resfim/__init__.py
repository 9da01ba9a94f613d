"""pFL-ResFIM against its baselines, and what its parameters do."""
