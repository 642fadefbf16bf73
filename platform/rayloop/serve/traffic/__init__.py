"""What an operator wants -> the plan in force in every replica, and doubtful rows settled."""
