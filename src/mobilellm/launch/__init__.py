"""Ways to start a run on machines that somebody else schedules."""
