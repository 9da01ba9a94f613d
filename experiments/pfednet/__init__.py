"""pFedNet and CER against their baselines: quality, bytes, and what λ does."""
