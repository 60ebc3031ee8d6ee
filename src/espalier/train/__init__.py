"""Training: one loop, to which objectives, schedules and moments are passed."""
