"""The records that a run writes: metrics, events, trajectories, pictures."""
