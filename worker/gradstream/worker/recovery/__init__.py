"""From a dead gang's state to a living one's: snapshot, replay of the journal, agreement with Redis."""
