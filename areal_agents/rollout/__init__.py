"""Episodes: one episode, the players and retries around it, and the buffer that they fill."""
