"""What a run writes down: metrics, events, trajectories, pictures."""
