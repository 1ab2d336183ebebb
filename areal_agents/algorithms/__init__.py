"""Pure functions from rewards and log-probabilities to advantages and losses."""
